"""The trackers themselves. Each imports its library in `start`, in a process of its own: see `recorder`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["MLflow", "TensorBoard", "Trackio", "WandB"]

_LONGEST = 500  # characters of a parameter that every MLflow server takes


def _page(values: Mapping[str, Any]) -> str:
    """A table in Markdown."""
    rows = (f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in values.items())
    return "\n".join(["| | |", "|---|---|", *rows])


class TensorBoard:
    """Event files in DIR/NAME; a command that goes on adds to them."""

    def __init__(self, place: str, name: str) -> None:
        self._folder = Path(place) / name

    def start(self, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(self._folder), flush_secs=10)
        self._writer.add_text("settings", _page(settings))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        if result is not None:
            self._writer.add_text("result", _page(result))
        self._writer.close()


class MLflow:
    """A run of the experiment `gpmetric` at a tracking URI, or where MLflow keeps runs by itself."""

    def __init__(self, place: str, name: str) -> None:
        self._place, self._name = place, name

    def start(self, settings: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow: Any = mlflow
        if self._place:
            mlflow.set_tracking_uri(self._place)
        mlflow.set_experiment("gpmetric")
        mlflow.start_run(run_name=self._name)
        mlflow.log_params({name: str(value)[:_LONGEST] for name, value in settings.items()})

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(figures), step=step)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        self._mlflow.set_tags({f"result.{name}": str(value) for name, value in (result or {}).items()})
        self._mlflow.end_run("KILLED" if result is None else "FINISHED")


class Trackio:
    """A run of a project, `gpmetric` by default, in trackio's own folder."""

    def __init__(self, place: str, name: str) -> None:
        self._project, self._name = place or "gpmetric", name

    def start(self, settings: Mapping[str, Any]) -> None:
        import trackio

        self._trackio: Any = trackio
        trackio.init(project=self._project, name=self._name, config=dict(settings), resume="allow", embed=False)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._trackio.log(dict(figures), step=step)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        if result is not None:
            self._trackio.log({f"result/{name}": value for name, value in result.items()})
        self._trackio.finish()


class WandB:
    """A run of a project, `gpmetric` by default; WANDB_MODE=offline keeps it here."""

    def __init__(self, place: str, name: str) -> None:
        self._project, self._name = place or "gpmetric", name

    def start(self, settings: Mapping[str, Any]) -> None:
        import wandb

        quiet = wandb.Settings(console="off", silent=True)
        self._run: Any = wandb.init(project=self._project, name=self._name, config=dict(settings), settings=quiet)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        self._run.summary.update({f"result/{name}": value for name, value in (result or {}).items()})
        self._run.finish(exit_code=1 if result is None else 0)
