"""Results that are there already are kept, by `ksparse eval` and by studies alike."""

import pytest

from ksparse.cli import evaluate as verb
from ksparse.config.evaluation import EvalConfig
from ksparse.errors import Interrupted
from ksparse.evals import runner
from ksparse.evals.positions import Positions
from ksparse.interop import load
from ksparse.training.train import train

OPTIONS = EvalConfig(tokens=64, per_document=64, device="cpu")
NAMES = ["stats", "positions"]


@pytest.fixture
def run(small_recipe, tmp_path):
    return train(small_recipe(), tmp_path / "run")


@pytest.fixture
def computed(monkeypatch):
    """The names of the evaluations that are computed, as they are asked for."""
    asked = []
    evaluate_many = runner.evaluate_many

    def watch(saes, lm, names, *args, **options):
        asked.append(list(names))
        return evaluate_many(saes, lm, names, *args, **options)

    monkeypatch.setattr(runner, "evaluate_many", watch)
    return asked


def evaluate(run, names=NAMES, options=OPTIONS, **others):
    return verb.evaluate_saes([str(run.path)], names, options, **others)[str(run.path)]


def test_what_is_there_is_kept_and_what_is_missing_computed(run, computed, capsys):
    first = evaluate(run, ["stats"])
    both = evaluate(run)
    assert computed == [["stats"], ["positions"]]
    assert list(both) == NAMES and both["stats"]["l0"] == first["stats"]["l0"]
    assert "kept     stats: computed before" in capsys.readouterr().err
    evaluate(run)
    assert computed == [["stats"], ["positions"]], "nothing is left to compute"
    evaluate(run, again=True)
    assert computed[-1] == NAMES


@pytest.mark.parametrize(
    ("key", "value"),
    [("checkpoint", 3), ("lm", "another"), ("site", "resid_post.0"), ("text", "other.txt")],
)
def test_a_result_of_something_else_is_not_kept(run, key, value):
    metadata = load(run.path).metadata
    evaluate(run, ["stats"])
    result = run.eval("stats")
    assert runner.read_kept(run, "stats", OPTIONS, metadata)["l0"] == result["l0"]
    runner.write_results(run, {"stats": runner.Result(result | {key: value}, {}, {})})
    assert runner.read_kept(run, "stats", OPTIONS, metadata) is None


def test_other_options_are_another_result(run):
    metadata = load(run.path).metadata
    evaluate(run, ["stats"])
    for options in (
        EvalConfig(tokens=65, per_document=64, device="cpu"),
        EvalConfig(tokens=64, per_document=64, device="cpu", split="train"),
        EvalConfig(tokens=64, per_document=64, device="cpu", examples=0),
    ):
        assert runner.read_kept(run, "stats", options, metadata) is None


def test_a_damaged_result_is_computed_again_and_named(run, caplog):
    metadata = load(run.path).metadata
    evaluate(run, ["stats"])
    run.arrays_file("stats").unlink()
    assert runner.read_kept(run, "stats", OPTIONS, metadata) is None
    assert "is missing" in caplog.text and "computed again" in caplog.text


def test_a_stopped_evaluation_leaves_what_is_complete_and_goes_on(run, computed, monkeypatch):
    finalize = Positions.finalize

    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Positions, "finalize", stop)
    with pytest.raises(Interrupted, match="stats of stats, positions complete and saved") as caught:
        evaluate(run)
    assert caught.value.exit_code == 130
    monkeypatch.setattr(Positions, "finalize", finalize)
    assert list(evaluate(run)) == NAMES
    assert computed == [NAMES, ["positions"]]


def test_numbers_of_other_saes_beside_a_result_must_be_there(run, small_recipe, tmp_path):
    other = train(small_recipe({"seed": 1}), tmp_path / "other")
    options = EvalConfig(tokens=64, per_document=64, device="cpu", progressive_tokens=64)
    metadata = load(run.path).metadata
    for sources, kept in (([run], False), ([run, other], True)):
        verb.evaluate_saes([str(each.path) for each in sources], ["progressive"], options)
        result = runner.read_kept(run, "progressive", options, metadata, ["other"])
        assert (result is not None) == kept
    assert runner.read_kept(run, "progressive", options, metadata) is not None
