"""Tiny random checkpoints, built here and offline, and the shared test assets where a machine has them."""

from __future__ import annotations

import os

# Before anything imports torch or Hugging Face's libraries: one thread, so that figures repeat, and no network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import random
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# A shell that starts a command in the background lets it ignore Ctrl-C, nohup a hangup; so would what is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

LONGEST = ("test_kernels.py", "test_readme.py", "test_docs.py")  # tests of a minute each
CONTEXT = 64  # positions of the tiny models
SIZES = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 4, "num_attention_heads": 4}
GROUPED = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 5},
    "ministral3": GROUPED | {"head_dim": 8},
    "qwen2": GROUPED | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": GROUPED | {"head_dim": 8},
    "gemma": GROUPED | {"head_dim": 8},
    "gemma2": GROUPED | {"head_dim": 8, "sliding_window": 5},
    "gemma3_text": GROUPED | {"head_dim": 8, "sliding_window": 5, "num_hidden_layers": 7},
    "phi": GROUPED,
    "phi3": GROUPED | {"sliding_window": 5},
    "olmo2": GROUPED,
    "olmo3": GROUPED | {"sliding_window": 5},
    "granite": GROUPED,
    "cohere": GROUPED,
    "cohere2": GROUPED | {"head_dim": 8, "sliding_window": 5},
    "stablelm": GROUPED,
    "starcoder2": GROUPED | {"sliding_window": 5},
    "smollm3": GROUPED,
    "glm4": GROUPED | {"head_dim": 8},
    "gpt_neox": SIZES,
    "opt": SIZES | {"ffn_dim": 44, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "bloom": {"hidden_size": 32, "n_layer": 4, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 5,
    },
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
}
WORDS = "the a one small large old metric weight layer model token prunes keeps scores reads of in under with and"


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what -m does not name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that none of them is all that is left to one of several processes.

    Of a test marked `every(n)`, all cases but each n-th are `nightly`.
    """
    items.sort(key=lambda item: item.path.name not in LONGEST)
    cases = Counter[str]()
    for item in items:
        if mark := item.get_closest_marker("every"):
            test = item.nodeid.partition("[")[0]
            if cases[test] % mark.args[0]:
                item.add_marker("nightly")
            cases[test] += 1


def make_text(seed: int, sentences: int) -> str:
    """Sentences of random words, one a line: no two windows alike."""
    draw = random.Random(seed)
    lines = (" ".join(draw.choices(WORDS.split(), k=draw.randint(4, 12))) for _ in range(sentences))
    return "".join(f"{line.capitalize()}.\n" for line in lines)


@pytest.fixture
def demo_of_golden_files() -> None:
    """Skips where the demo's texts, which are of the interpreter's own library, are not those of golden ledgers."""
    from gpmetric.demo.text import demo_text

    if sha256(demo_text("test").encode()).hexdigest()[:12] != "6e975b42ce8d":  # of CPython 3.11.7
        pytest.skip("the library of this Python is another text than that of tests/golden")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of some kB: more than 64 windows of 32 tokens of `tiny_tokenizer`."""
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text(make_text(seed=0, sentences=200), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of about 300 tokens, fitted to a short text; id 0 ends a text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([make_text(seed=1, sentences=50)], vocab_size=300, special_tokens=["<|endoftext|>"])
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, model_max_length=CONTEXT, **ends)


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Callable[..., Path]:
    """Writes a random model of any architecture, with the tiny tokenizer: save_model(model_type, **config) -> Path."""

    def save(model_type: str, **config: Any) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
        built = AutoConfig.for_model(model_type, **({"vocab_size": len(tiny_tokenizer)} | ends | config))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(built)
        folder = tmp_path_factory.mktemp(model_type)
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_llama(save_model: Callable[..., Path]) -> Path:
    """Directory of a random Llama: 3 blocks, 32 wide, 4 query and 2 key-value heads, tied embeddings."""
    return save_model(
        "llama",
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )


@pytest.fixture(scope="session")
def tiny_gpt2(save_model: Callable[..., Path]) -> Path:
    """Directory of a random GPT-2: 3 blocks, 32 wide, every layer a Conv1D with its weight as [in, out]."""
    return save_model("gpt2", n_embd=32, n_layer=3, n_head=4, n_positions=CONTEXT, initializer_range=0.2)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, save_model: Callable[..., Path]) -> Any:
    """A random model of each architecture, loaded."""
    from gpmetric.loading import load_model

    return load_model(str(save_model(request.param, **ARCHITECTURES[request.param])))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What slim writes is read again in this process: a fresh one takes seconds to begin."""
    from gpmetric.structured import reload, slim_checkpoint

    def run_here(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        reload.main(*command[3:])
        return subprocess.CompletedProcess(command, 0, "", "")

    # of that module alone: others start programs of their own
    monkeypatch.setattr(slim_checkpoint, "subprocess", SimpleNamespace(**vars(subprocess) | {"run": run_here}))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared test assets: `$GPMETRIC_SHARED`, or `shared` beside the repository."""
    path = Path(os.environ.get("GPMETRIC_SHARED") or Path(__file__).parents[2] / "shared")
    if not path.is_dir():
        pytest.skip(f"no shared assets in {path} (set GPMETRIC_SHARED)")
    return path
