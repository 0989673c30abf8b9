"""The command line: one-screen errors with value, expectation and hint, exit code 1, before any work."""

import json
import subprocess
import sys

import pytest

from clipgap_ray import cli, rundir, store
from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.shards import write_tar
from tests.index_fixture import unit_rows, write_embeddings


def run(capsys, *words):
    """Run the command line; returns exit code, stdout, stderr."""
    code = cli.main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def assert_one_screen(error, *expected):
    assert len(error.splitlines()) <= 25, error
    for text in expected:
        assert text in error


def test_no_words_prints_the_commands(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    for verb in [*cli.VERBS, "split"]:
        assert f"  {verb} " in out


def test_a_reader_that_has_gone_is_no_traceback():
    command = [sys.executable, "-m", "clipgap_ray.cli", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == cli.EXIT_ERROR


def test_another_broken_pipe_is_not_taken_for_it(monkeypatch):
    def broken(_words):
        raise BrokenPipeError

    monkeypatch.setattr(cli, "_dispatch", broken)
    with pytest.raises(BrokenPipeError):
        cli.main(["status", "x"])


def test_a_misspelled_command_names_the_nearest(capsys):
    code, _, error = run(capsys, "embde", "x")
    assert code == 1
    assert_one_screen(error, "'embde'", "did you mean 'embed'?")


def test_a_misspelled_flag_is_refused(capsys):
    code, _, error = run(capsys, "embed", "pool", "--out", "x", "--model", "projection", "--batchsize", "3")
    assert code == 1
    assert_one_screen(error, "--batchsize")


def test_a_missing_directory(capsys, tmp_path):
    code, _, error = run(capsys, "embed", str(tmp_path / "gone"), "--out", str(tmp_path / "o"), "--model", "projection")
    assert code == 1
    assert_one_screen(error, "gone does not exist", "hint:")
    assert not (tmp_path / "o").exists()


def test_an_empty_pool(capsys, tmp_path):
    (tmp_path / "pool").mkdir()
    out = tmp_path / "o"
    code, _, error = run(capsys, "embed", str(tmp_path / "pool"), "--out", str(out), "--model", "projection")
    assert code == 1
    assert_one_screen(error, "no shards in", "hint:")
    assert not out.exists()


def test_an_unknown_model_names_the_nearest(capsys, tmp_path):
    (tmp_path / "00000.tar").write_bytes(write_tar([]))
    out = tmp_path / "o"
    code, _, error = run(capsys, "embed", str(tmp_path), "--out", str(out), "--model", "ViT-B-23", "--pretrained", "x")
    assert code == 1
    assert_one_screen(error, "unknown model 'ViT-B-23'", "ViT-B-32", "hint:")
    assert not out.exists()


def test_a_misspelled_setting_in_a_study_names_the_nearest(capsys, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text("name: x\nworld: {preset: tiny}\ntrain: {num_sample: 3}\nruns: [{split: full}]\n")
    code, _, error = run(capsys, "run", str(study), "--out", str(tmp_path / "o"))
    assert code == 1
    assert_one_screen(error, "train.num_sample", "did you mean 'num_samples'?")
    assert not (tmp_path / "o").exists()


def test_a_study_that_runs_an_undefined_split(capsys, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text("name: x\nworld: {preset: tiny}\nruns: [{split: full}, {split: gap-sketsh}]\n")
    code, _, error = run(capsys, "run", str(study))
    assert code == 1
    assert_one_screen(error, "gap-sketsh")


def test_a_test_set_without_class_names(capsys, tmp_path):
    (tmp_path / "set" / "test").mkdir(parents=True)
    (tmp_path / "set" / "test" / "nshards.txt").write_text("1")
    (tmp_path / "set" / "test" / "0.tar").write_bytes(write_tar([]))
    words = ["evaluate", "--model", "conv-64-test", "--pretrained", "random", "--out", str(tmp_path / "o")]
    code, _, error = run(capsys, *words, "--test", f"val={tmp_path / 'set'}")
    assert code == 1
    assert_one_screen(error, "no class names", "classnames.txt", "hint:")
    assert not (tmp_path / "o").exists()


def test_rows_of_different_encoders_are_refused(capsys, tmp_path):
    first = write_embeddings(tmp_path / "pool", [unit_rows(8, 0)])
    second = write_embeddings(tmp_path / "test", [unit_rows(4, 1)])
    manifest = store.read_json(f"{second}/manifest.json")
    manifest["encoder"]["weights_sha256"] = "another"
    store.write_json(f"{second}/manifest.json", manifest)
    words = ["score", "--pool", str(first), "--test", f"val={second}", "--out", str(tmp_path / "o")]
    code, _, error = run(capsys, *words)
    assert code == 1
    assert_one_screen(error, "IndexMismatchError", "weights_sha256", "hint:")
    assert not (tmp_path / "o").exists()


def test_doctor_prints_json_and_finds_one_faiss(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert json.loads(out)["faiss"].startswith("faiss-")


def test_two_faiss_wheels_are_refused(monkeypatch):
    from clipgap_ray import environment
    from clipgap_ray.errors import ConfigError

    monkeypatch.setattr(environment, "installed", lambda names: {"faiss-cpu": "1.15.1", "faiss-gpu-cuvs": "1.15.1"})
    with pytest.raises(ConfigError, match=r"faiss-cpu 1\.15\.1, faiss-gpu-cuvs 1\.15\.1; expected exactly one"):
        environment.require_one_faiss()


def test_status_counts_parts_and_rows(capsys, tmp_path):
    with rundir.RunDirectory(str(tmp_path / "emb"), "embed", {}) as directory:
        rundir.assign_parts(directory.uri, ["a.tar", "b.tar", "c.tar"])
        directory.log.append([{"part": 0, "read": 5, "kept": 4, "dropped": {"broken_image": 1}}])
    code, out, _ = run(capsys, "status", str(tmp_path))
    assert code == 0
    stage = json.loads(out)["stages"]["emb"]
    assert (stage["parts_done"], stage["parts_known"], stage["rows"], stage["complete"]) == (1, 3, 4, False)
    assert stage["dropped"] == {"broken_image": 1}


def test_random_weights_need_no_download():
    assert EncoderSettings("conv-64-test", "random").build().dim == 32
