"""The best checkpoint (--save_best), and a run that ends where evaluations get no better (--early_stopping)."""

import argparse
import os
import re
import sys
import types

import train
from simcse import flags
from simcse.console import InputError
from simcse.encoder.weights import read_record
from simcse.files import write_json
from simcse.text import textfile
from simcse.training import best, checkpoints, trainer
from simcse.training.state import RunSettings

import pytest
from training import saving_flags, weights


def evaluation(step, recall, since=0, test_set_digest="digest"):
    return best.BestEvaluation(step, {"recall@1": recall, "recall@5": 90.0}, since, test_set_digest)


def trainer_with(best_evaluation, save_dir="", step=8, early_stopping=None):
    """A trainer that can only compare and save evaluations."""
    run = object.__new__(trainer.Trainer)
    run.args = argparse.Namespace(save_dir=str(save_dir), early_stopping=early_stopping)
    run.best = best_evaluation
    run.step = step
    run.settings = RunSettings({"batch_size": 8}, {})
    return run


# ---------------------------------------------------------------------------------------------------------- comparison
def test_the_first_measure_decides_and_of_equal_ones_the_first_stays():
    run = best.BestEvaluation()
    for step, measures, is_best, since in ((2, {}, False, 1), (4, {"recall@1": 50.0, "recall@5": 80.0}, True, 0),
                                           (6, {"recall@1": 49.9, "recall@5": 99.0}, False, 1),
                                           (8, {"recall@1": 50.0, "recall@5": 99.0}, False, 2), (10, {}, False, 3),
                                           (12, {"recall@1": 50.1, "recall@5": 70.0}, True, 0)):
        assert run.update(step, measures) == is_best, step
        assert run.evaluations_since == since, step
    assert run.step == 12 and run.measures == {"recall@1": 50.1, "recall@5": 70.0}


@pytest.mark.parametrize("of_first_rank", [True, False])
def test_other_ranks_do_as_the_first_which_alone_measures(monkeypatch, of_first_rank):
    asked = []
    monkeypatch.setattr(best, "any_rank", lambda flag: asked.append(flag) or of_first_rank)
    run = best.BestEvaluation()
    assert run.update(4, {}) == of_first_rank and asked == [False]
    assert (run.step, run.evaluations_since) == ((4, 0) if of_first_rank else (None, 1))


@pytest.mark.parametrize("since, patience, stops", [(2, 3, False), (3, 3, True), (9, None, False), (1, 1, True)])
def test_when_a_run_stops_early(capsys, since, patience, stops):
    run = trainer_with(evaluation(30, 51.0, since), step=60, early_stopping=patience)
    assert run.stops_early() == stops
    count = "1 evaluation" if since == 1 else f"{since} evaluations"
    line = f"stopping early after step 60: {count} in a row were not better than the best; "
    assert capsys.readouterr().err == (f"{line}the best: recall@1=51.0 after step 30\n" if stops else "")


def test_a_run_that_has_stopped_early_takes_no_step_when_it_is_resumed():
    called = []
    run = types.SimpleNamespace(step=6, total_steps=48, model=None, stops_early=lambda: True,
                                save=lambda: called.append("save"),
                                finish_signal_handling=lambda: called.append("stop"))
    train.run_steps(argparse.Namespace(save_steps=4, eval_steps=2), run, iter([None]), None)
    assert called == ["save", "stop"]


@pytest.mark.parametrize("save_best, early_stopping, calls", [
    (True, None, ["log", "update", "save"]), (False, 3, ["log", "update"]), (False, None, ["log"])])
def test_an_evaluation_is_logged_compared_and_saved(save_best, early_stopping, calls):
    called = []
    run = types.SimpleNamespace(
        step=8, log_measures=lambda group, measures: called.append("log"), save_best=lambda: called.append("save"),
        update_best=lambda measures: called.append("update") or measures["recall@1"] > 50)
    args = argparse.Namespace(save_best=save_best, early_stopping=early_stopping)
    train.evaluate_step(args, run, lambda: {"recall@1": 60.0})
    assert called == calls and run.evaluated_step == 8
    train.evaluate_step(args, run, lambda: {"recall@1": 40.0})
    assert called == calls + [call for call in calls if call != "save"]


# -------------------------------------------------------------------------------------------------------------- saving
def write_model(folder):
    write_json(os.path.join(folder, "simcse_config.json"), {"pooling": "mean"})


def test_model_best_is_replaced_whole_with_its_step_and_measures(tmp_path, capsys):
    run = trainer_with(evaluation(8, 51.0), tmp_path)
    folder = tmp_path / "model_best"
    folder.mkdir()
    for name in ("model_state.safetensors", "training_state.json"):  # of other weights
        (folder / name).write_text("old")
    run.write_model = write_model
    run.save_best()
    assert os.listdir(folder) == ["simcse_config.json"] and os.listdir(tmp_path) == ["model_best"]
    record = read_record(str(folder))
    assert record.pop("run_digest") and record == {"pooling": "mean", "step": 8, "measures": run.best.measures}
    assert capsys.readouterr().err == f"saved {folder}: recall@1=51.0 after step 8\n"

    def fail(folder):
        write_model(folder)
        raise RuntimeError

    run.write_model = fail
    run.step = 12
    with pytest.raises(RuntimeError):
        run.save_best()
    assert read_record(str(folder))["step"] == 8 and os.listdir(tmp_path) == ["model_best"]


def test_model_best_is_not_resumed_from_and_does_not_go_with_the_old(tmp_path):
    for name in ("model_best", "model_4", "model_8"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "training_state.json").write_text("{}")
    checkpoints.remove_old(str(tmp_path), 8, 1)
    assert sorted(os.listdir(tmp_path)) == ["model_8", "model_best"]
    assert checkpoints.newest_resumable(str(tmp_path)) == str(tmp_path / "model_8")


@pytest.mark.parametrize("saved", [evaluation(4, 51.0), evaluation(12, 52.0)])
def test_a_resumed_run_goes_on_with_the_evaluation_of_model_best(tmp_path, capsys, saved):
    """It is that of the training state, or a later one, up to which the evaluations that are repeated do not count."""
    before = trainer_with(saved, tmp_path, step=saved.step)
    before.write_model = write_model
    before.save_best()
    capsys.readouterr()
    run = trainer_with(evaluation(4, 51.0, since=1), tmp_path)
    run.restore_best()
    assert run.best == evaluation(saved.step, saved.measures["recall@1"], since=1 if saved.step == 4 else 0)
    counts = []
    for step in (10, 12, 14):
        assert not run.best.update(step, {"recall@1": 51.0})
        counts.append(run.best.evaluations_since)
    assert counts == ([2, 3, 4] if saved.step == 4 else [0, 0, 1]) and not capsys.readouterr().err


@pytest.mark.parametrize("of_other_run", [
    {"settings": RunSettings({"batch_size": 4}, {})}, {"best": evaluation(4, 51.0, test_set_digest="another")}, None])
def test_a_resumed_run_does_not_compare_with_the_model_best_of_another(tmp_path, capsys, of_other_run):
    if of_other_run is not None:
        other = trainer_with(evaluation(4, 51.0), tmp_path, step=4)
        vars(other).update(of_other_run)
        other.write_model = write_model
        other.save_best()
    capsys.readouterr()
    run = trainer_with(evaluation(4, 51.0, since=2), tmp_path)
    run.restore_best()
    assert run.best == best.BestEvaluation(test_set_digest="digest")
    line = f"{tmp_path}/model_best is not of the run that is resumed; the next evaluation replaces it\n"
    assert capsys.readouterr().err == ("" if of_other_run is None else line)


@pytest.mark.parametrize("record, message", [
    ({"measures": {"recall@1": 51.0}}, "step: missing"),
    ({"step": 4}, "measures: expected a number for each name, got None"),
    ({"step": 4, "measures": {}}, "got {}"), ({"step": 4, "measures": {"recall@1": "abc"}}, "got {'recall@1': 'abc'}")])
def test_a_record_of_model_best_that_lacks_something_is_an_input_error(record, message):
    with pytest.raises(InputError, match=f"folder/simcse_config.json: .*{re.escape(message)}"):
        best.check_best_record(record, "folder")


def test_a_resumed_run_keeps_the_count_of_its_undefined_evaluations(tmp_path):
    run = trainer_with(best.BestEvaluation(evaluations_since=2, test_set_digest="digest"), tmp_path, early_stopping=3)
    run.restore_best()
    assert not run.best.update(10, {}) and run.best.evaluations_since == 3 and run.stops_early()


def test_other_ranks_have_the_step_that_the_first_has_on_its_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(best, "gather_numbers", lambda number: [12, number])
    run = trainer_with(evaluation(4, 51.0, since=1), tmp_path)
    run.restore_best()
    assert (run.best.step, run.best.evaluations_since) == (12, 0)


def test_a_model_best_that_a_run_does_not_update_is_warned_about(tmp_path, capsys):
    train.warn_of_older_best(str(tmp_path))
    assert not capsys.readouterr().err
    (tmp_path / "model_best").mkdir()
    train.warn_of_older_best(str(tmp_path))
    assert "model_best: not updated without --save_best" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- flags
@pytest.mark.parametrize("flag", ["--save_best", "--early_stopping=3"])
def test_without_a_test_set_there_is_nothing_to_compare(monkeypatch, capsys, sample, tmp_path, flag):
    words = ["train.py", "--device", "cpu", flag, "--train_set_file", str(sample / "train_unsupervised.csv")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        train.parse_args()
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and f"{flag.split('=')[0]} compares evaluations; give --test_set_file" in line
    (tmp_path / "dev.csv").write_text("甲\t乙\t1\n丙\t丁\t1\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [*words, "--test_set_file", str(tmp_path / "dev.csv")])
    with pytest.raises(InputError, match="dev.csv: every label is 1, .* --early_stopping need an evaluation"):
        train.read_test_set(train.parse_args())
    assert not capsys.readouterr().err


def test_training_is_not_resumed_from_model_best(monkeypatch, capsys, sample, tmp_path):
    (tmp_path / "model_best").mkdir()
    monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cpu", "--resume", str(tmp_path / "model_best"),
                                      "--train_set_file", str(sample / "train_unsupervised.csv")])
    with pytest.raises(SystemExit):
        train.parse_args()
    assert "model_best: no checkpoint folder that training can go on from" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- whole runs
class Killed(Exception):
    """Ends a run in the middle of an evaluation."""


@pytest.fixture
def run_training(monkeypatch, sample, tmp_path):
    """Trains 16 steps in this process, with evaluations whose Recall@1 are given: run_training(recalls, *flags).

    A checkpoint is saved every 4 steps. Evaluations come every 3 steps and after the last one; None in place of a
    recall ends the run as a kill does.
    """
    monkeypatch.setattr(trainer, "train_faster_on_cpu", lambda model: None)  # it changes paddle for later tests
    monkeypatch.setattr(trainer.StopSignal, "listen", lambda stop_signal: None)

    def run(recalls, *more):
        words = saving_flags(
            sample, "--epochs", 1, "--test_set_file", sample / "dev.csv", "--eval_steps", 3, "--pooling", "first_avg",
            "--output_emb_size", 0, "--resume", "--visualdl_dir", tmp_path / "log", *more)
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        args = flags.resolve_training(train.parse_args())
        texts = textfile.TextFile(args.train_set_file, "--train_set_file", (1, 2, 3))
        upcoming = iter(recalls)

        def evaluate_on_ranks(*_):
            recall = next(upcoming)
            if recall is None:
                raise Killed
            return {"recall@1": recall, "recall@5": 90.0}

        monkeypatch.setattr(train, "evaluate_on_ranks", evaluate_on_ranks)
        train.train(args, texts, train.read_test_set(args))
        assert not list(upcoming), "fewer evaluations than expected"

    return run


def test_the_best_checkpoint_of_a_broken_run_is_that_of_an_unbroken_one(run_training, tmp_path):
    """The run breaks after step 12, when its best evaluation is later than its last checkpoint, of step 8."""
    more = ["--save_best", "--keep_checkpoints", 1, "--save_dir"]
    run_training([50, 55, 60, 40, 60, 58], *more, tmp_path / "whole")
    with pytest.raises(Killed):
        run_training([50, 55, 60, None], *more, tmp_path / "broken")
    assert sorted(os.listdir(tmp_path / "broken")) == ["model_8", "model_best"]
    saved = os.stat(tmp_path / "broken" / "model_best").st_ino
    run_training([60, 40, 60, 58], *more, tmp_path / "broken")
    assert os.stat(tmp_path / "broken" / "model_best").st_ino == saved, "nothing was better than step 9"
    expected = weights(tmp_path / "whole" / "model_best")
    for name in ("whole", "broken"):
        assert sorted(os.listdir(tmp_path / name)) == ["model_16", "model_best"]
        record = read_record(str(tmp_path / name / "model_best"))
        assert (record["step"], record["measures"]) == (9, {"recall@1": 60, "recall@5": 90.0})
        found = weights(tmp_path / name / "model_best")
        assert found.keys() == expected.keys()
        assert all((found[key] == expected[key]).all() for key in found)


def test_early_stopping_saves_the_last_step_and_a_resumed_run_takes_no_more(run_training, tmp_path, capsys):
    more = ["--early_stopping", 2, "--save_dir", tmp_path / "ck"]
    run_training([50, 49, 50], *more)
    assert checkpoints.saved_steps(str(tmp_path / "ck")) == [4, 8, 9]
    assert "stopping early after step 9: 2 evaluations in a row were not better" in capsys.readouterr().err
    run_training([50], *more)  # the evaluation after the last step
    assert checkpoints.saved_steps(str(tmp_path / "ck")) == [4, 8, 9]
    run_training([51, 52, 53], "--early_stopping", 4, "--save_dir", tmp_path / "ck")
    assert checkpoints.saved_steps(str(tmp_path / "ck")) == [4, 8, 9, 12, 16]
