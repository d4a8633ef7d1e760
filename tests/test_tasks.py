"""Tasks of lm-eval: a small local one against probabilities worked out here; what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import gpmetric
from gpmetric.errors import GpmetricError, InputError
from gpmetric.loading import load_model

ROWS = [
    ("def f(x):\n    return", [" x", " the of"]),
    ("import", [" zzz qq", " sys"]),
    ("for i in", [" range(3)", " purple"]),
    ("class A(", ["object):", "7 7 7 7"]),
]
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("accelerate") is None,
    reason="gpmetric[lm-eval] is not installed",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "tasks"
    made.mkdir()
    rows = [{"question": question, "choices": choices, "answer": 0} for question, choices in ROWS]
    (made / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (made / "words.yaml").write_text(
        "task: local_words\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {made / 'words.jsonl'}\noutput_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\ndoc_to_choice: "{{choices}}"\n'
        'target_delimiter: ""\nmetric_list:\n  - metric: acc\n'
    )
    return made


@needs_harness
def test_accuracy_is_that_of_probabilities_worked_out_here(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, right = load_model(device="cpu"), 0
    for question, choices in ROWS:
        sums = []
        for choice in choices:
            before, whole = (model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in
                             (question, question + choice))  # fmt: skip
            tokens = torch.tensor([whole])
            with torch.no_grad():
                log = model.module(tokens).logits[0].log_softmax(dim=-1)
            sums.append(sum(float(log[place - 1, whole[place]]) for place in range(len(before), len(whole))))
        right += sums[0] > sums[1]
    found = gpmetric.evaluate(tasks="local_words", task_folder=folder, device="cpu")
    assert found["tasks"]["local_words"]["acc"] == right / len(ROWS)
    assert found["ppl"] == {}
    both = gpmetric.evaluate(
        tasks="local_words", task_folder=folder, limit=1, text="demo:test", windows=2, device="cpu"
    )
    assert both["tasks"]["local_words"]["acc"] in (0, 1)
    assert both["ppl"].keys() == {"demo:test"}
    with pytest.raises(InputError, match="'local_word' is no task or group of lm-eval; near are local_words"):
        gpmetric.evaluate(tasks="local_word", task_folder=folder)
    (folder / "words.jsonl").unlink()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "empty"))
    with pytest.raises(GpmetricError, match="the harness failed"):
        gpmetric.evaluate(tasks="local_words", task_folder=folder, device="cpu")


@pytest.mark.parametrize("line", ["doc_to_text: !function utils.f", "class: !function x.y", "x: !!python/object:os.f"])
def test_code_is_refused(line: str, folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "bad.yml").write_text(f"task: bad\n{line}\n")
    with pytest.raises(InputError, match=r"bad.yml.* runs code"):
        gpmetric.evaluate(tasks="local_words", task_folder=folder)


def test_what_does_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--shots is of --tasks"):
        gpmetric.evaluate(shots=2)
    with pytest.raises(InputError, match="is no folder"):
        gpmetric.evaluate(tasks="x", task_folder=tmp_path / "none")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_the_extra_is_named() -> None:
    with pytest.raises(InputError, match=r"pip install 'gpmetric\[lm-eval\]'"):
        gpmetric.evaluate(tasks="arc_easy")
