"""A Ray cluster of three nodes on this machine, for tests."""

from __future__ import annotations

import atexit
import os
from functools import cache
from typing import Any

import pytest

__all__ = ["ray_cluster"]


@cache
def ray_cluster() -> Any:
    """Three nodes of one CPU each, which end with the process; skips where Ray is not installed."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    atexit.register(lambda: (ray.shutdown(), cluster.shutdown()))
    return cluster
