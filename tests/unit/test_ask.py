"""`clipgap query` and `clipgap swap` against the real routes, in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from clipgap_ray import cli, schema
from clipgap_ray.client import Neighbour, SearchResult, commands
from clipgap_ray.config.ask import QuerySettings, SwapCommand, read_conditions
from clipgap_ray.encoder import EncoderSettings
from clipgap_ray.errors import ConfigError, DataError, ServiceError
from clipgap_ray.kernels.topk import exact_topk
from clipgap_ray.serving.admin import Admin, SwapState
from clipgap_ray.serving.api import make_api
from clipgap_ray.serving.guard import token_sha256
from clipgap_ray.serving.local import LocalBackend
from clipgap_ray.serving.messages import ApiError
from tests.index_fixture import all_rows, uid, unit_rows, write_embeddings
from tests.service_fixture import serve_locally
from tests.waiting import free_port

PARTS = [unit_rows(20, seed) for seed in range(2)]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> LocalBackend:
    folder = tmp_path_factory.mktemp("ask")
    return serve_locally(write_embeddings(folder / "emb", PARTS), folder / "index")


class Operator:
    """Goes through the states of a swap, one per look."""

    def __init__(self, *states: str) -> None:
        self.states = list(states)
        self.asked: list[tuple[str, str | None]] = []

    def _state(self) -> SwapState:
        state: Any = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if state == "lost":
            raise ApiError(503, "operator_lost", "the operator did not answer")
        if state == "none":
            return SwapState()
        message = "while loading: out of memory" if state == "failed" else None
        return SwapState(state=state, index="pool", version_before="v1", version_after="v2", message=message)

    async def swap(self, index: str, uri: str | None) -> SwapState:
        self.asked.append((index, uri))
        if index != "pool":
            raise ApiError(404, "unknown_index", "no such index", "known indexes: pool")
        return self._state()

    async def swap_state(self) -> SwapState:
        return self._state()


@pytest.fixture
def service(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[httpx.MockTransport, Operator, list[httpx.Request]]]:
    """The service with both tokens, reached without a network; what was sent to it."""
    for name in ("CLIPGAP_TOKEN", "CLIPGAP_TOKEN_FILE", "CLIPGAP_ADMIN_TOKEN", "CLIPGAP_ADMIN_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(commands, "LOOK_S", 0.0)
    operator, seen = Operator("loading", "flipping", "draining", "done"), []
    app = make_api(backend, token_hash=token_sha256("read"), admin=Admin(token_sha256("admin"), operator))
    with TestClient(app) as inside:

        def answer(request: httpx.Request) -> httpx.Response:
            seen.append(request)
            got = inside.request(request.method, request.url.path, content=request.read(), headers=request.headers)
            return httpx.Response(got.status_code, content=got.content)

        yield httpx.MockTransport(answer), operator, seen


def ask(service: Any, **words: Any) -> dict[str, Any]:
    found = commands.query(QuerySettings(json_=True, **words), service[0])
    assert found is not None
    return found


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch, service: Any) -> Any:
    monkeypatch.setenv("CLIPGAP_TOKEN", "read")
    return service


def test_every_kind_of_query_finds_the_exact_neighbours(reader: Any, tmp_path: Path) -> None:
    rows, row_ids = all_rows(PARTS)
    encoder = EncoderSettings("projection").build()
    np.save(tmp_path / "one.npy", PARTS[1][3].astype(np.float32))
    np.save(tmp_path / "two.npy", PARTS[1][3:5])
    text = encoder.encode_texts(["a red bird"])
    for words, query in (
        ({"text": "a red bird"}, text),
        ({"vector": str(tmp_path / "one.npy")}, PARTS[1][3:4]),
        ({"vector": str(tmp_path / "two.npy")}, PARTS[1][3:5]),
        ({"uid": uid(0, 7)}, PARTS[0][7:8]),
    ):
        found = ask(reader, k=4, **words)
        expected = exact_topk(query, rows, row_ids, 4)[1].tolist()
        assert [[row["row_id"] for row in near] for near in found["results"]] == expected, words


def test_an_image_file_is_sent_as_it_is(reader: Any, tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(path)
    encoder = EncoderSettings("projection").build()
    row = encoder.encode_images(encoder.preprocess.decode(path.read_bytes())[None])
    found = ask(reader, image=str(path), k=3)
    assert [near["row_id"] for near in found["results"][0]] == exact_topk(row, *all_rows(PARTS), 3)[1][0].tolist()


def test_filters_and_modality_reach_the_service(reader: Any) -> None:
    captions = ("caption 0 1", "caption 1 2")
    found = ask(reader, text="x", filter=("caption=caption 0 1|caption 1 2",), modality="image")
    assert sorted(row["caption"] for row in found["results"][0]) == sorted(captions)
    with pytest.raises(ServiceError, match="404 unknown_index: no index holds text embeddings"):
        ask(reader, text="x", modality="text")
    with pytest.raises(ServiceError, match="400 wrong_modality"):
        ask(reader, text="x", modality="text", index="pool")
    with pytest.raises(ServiceError, match="400 invalid_filter: no such column"):
        ask(reader, text="x", filter=("colour>=1",))
    with pytest.raises(ServiceError, match="400 invalid_filter: no such split"):
        ask(reader, text="x", filter=("split=none",))


def test_conditions_are_read_as_the_service_wants_them() -> None:
    assert read_conditions(("width>=512", "clip_score <= 0.3", "caption=a=b", "label=3|4", "split=gap-a")) == [
        {"column": "width", "at_least": 512.0},
        {"column": "clip_score", "at_most": 0.3},
        {"column": "caption", "equals": "a=b"},
        {"column": "label", "any_of": [3.0, 4.0]},
        {"split": "gap-a"},
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "the query is not there"),
        ({"text": "a", "uid": "b"}, "the query is --text and --uid"),
        ({"text": "a", "filter": ("width>3",)}, "'width>3' is no condition"),
        ({"text": "a", "filter": ("width>=many",)}, "'many' is no number"),
        ({"text": "a", "filter": ("split>=1",)}, "a split keeps a row or does not"),
        ({"text": "a", "url": "localhost:8000"}, "is no address of a service"),
        ({"text": "a", "k": 0}, "k is 0"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_sent(words: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuerySettings.load(words, "query")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 2)), "float64 of shape"),
        (np.array(["a"]), "expected numbers"),
        (np.array([1.0, np.nan]), "NaN or infinity"),
        (np.zeros((0, 4)), "of shape"),
        (None, "No such file"),
        (b"hello", "is no .npy array"),
    ],
)
def test_a_file_that_holds_no_vectors_is_named(array: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif array is not None:
        np.save(path, array)
    with pytest.raises(DataError, match=message):
        commands.query(QuerySettings(vector=str(path)), httpx.MockTransport(lambda request: pytest.fail("was sent")))


def test_the_table_is_for_eyes_and_terminals(reader: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.query(QuerySettings(uid=uid(0, 1), k=2), reader[0]) is None
    head, first, *_ = capsys.readouterr().out.splitlines()
    assert head == "pool, version v1"
    assert first.split()[:3] == ["1", first.split()[1], uid(0, 1)]
    assert first.endswith("caption 0 1")
    row = Neighbour(row_id=1, similarity=0.5, caption="red \x1b[31m\n bird " + "x" * 200, splits=["near"])
    lines = commands.table(SearchResult("pool", "v", 1, 1, False, [[row], []]), 80)
    assert lines[1:] == ["query 0", lines[2], "query 1", "  nothing found"]
    assert "[near]  red ?[31m bird" in lines[2]
    assert len(lines[2]) == 80


def test_a_token_that_is_missing_or_wrong_is_said(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServiceError, match="wants a bearer token: CLIPGAP_TOKEN is not set"):
        ask(service, text="x")
    monkeypatch.setenv("CLIPGAP_TOKEN", "guess")
    with pytest.raises(ServiceError, match="the token of CLIPGAP_TOKEN is not the service's"):
        ask(service, text="x")


def test_nobody_there_is_exit_code_1_and_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    for words in (["query", "--text", "x"], ["swap", "pool"]):
        assert cli.main([*words, "--url", url]) == 1
        error = capsys.readouterr().err
        assert f"ServiceError: {url} does not answer" in error
        assert "hint: is `clipgap serve` running there?" in error


def test_there_is_no_flag_for_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["query", "--text", "x", "--token", "secret"]) == 1
    assert "secret" not in capsys.readouterr().out
    assert not [name for name in (*QuerySettings.model_fields, *SwapCommand.model_fields) if "token" in name]


def swap(service: Any, *words: str, **more: Any) -> dict[str, Any]:
    return commands.swap(SwapCommand(name=words[0], version="".join(words[1:]), **more), service[0])


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch, service: Any) -> Any:
    monkeypatch.setenv("CLIPGAP_ADMIN_TOKEN", "admin")
    return service


def test_a_swap_is_awaited_and_the_new_version_returned(admin: Any, tmp_path: Path) -> None:
    _, operator, seen = admin
    assert swap(admin, "pool", str(tmp_path)) == {"index": "pool", "version_before": "v1", "version": "v2"}
    assert operator.asked == [("pool", str(tmp_path))]
    assert [request.method for request in seen] == ["POST", "GET", "GET", "GET"]
    assert json.loads(seen[0].content) == {"index": "pool", "uri": str(tmp_path)}


def test_a_relative_folder_is_the_one_seen_from_here(admin: Any) -> None:
    operator = admin[1]
    swap(admin, "pool", "out/index")
    swap(admin, "pool", "s3://bucket/index")
    swap(admin, "pool")
    assert operator.asked == [("pool", str(Path.cwd() / "out/index")), ("pool", "s3://bucket/index"), ("pool", None)]


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (["loading", "failed"], "failed: while loading: out of memory; version v1 answers on"),
        (["loading", "none"], "knows of no swap of pool to v2 any more"),
        (["loading", "lost"], "503 operator_lost"),
        (["loading"], "is still loading after 0.05 s"),
    ],
)
def test_a_swap_that_does_not_end_well_is_an_error(admin: Any, states: list[str], message: str) -> None:
    admin[1].states = states
    with pytest.raises(ServiceError, match=message):
        swap(admin, "pool", timeout_s=0.05 if states == ["loading"] else 60.0)


def test_a_look_that_fails_once_is_no_failure(admin: Any) -> None:
    admin[1].states = ["loading", "lost", "lost", "draining", "lost", "done"]
    assert swap(admin, "pool")["version"] == "v2"


def test_an_unknown_index_and_a_readers_token_are_refused(admin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServiceError, match="404 unknown_index") as caught:
        swap(admin, "other")
    assert caught.value.hint == "known indexes: pool"
    monkeypatch.setenv("CLIPGAP_ADMIN_TOKEN", "read")
    with pytest.raises(ServiceError, match="the token of CLIPGAP_ADMIN_TOKEN is not the service's"):
        swap(admin, "pool")


def test_a_service_without_an_admin_says_so(backend: LocalBackend) -> None:
    with TestClient(make_api(backend)) as inside:

        def answer(request: httpx.Request) -> httpx.Response:
            got = inside.request(request.method, request.url.path, content=request.read())
            return httpx.Response(got.status_code, content=got.content)

        with pytest.raises(ServiceError, match="lets nobody swap"):
            commands.swap(SwapCommand(name="pool"), httpx.MockTransport(answer))


def test_the_filter_knows_which_columns_are_texts() -> None:
    (condition,) = read_conditions(("class_name=3",))
    assert condition == {"column": "class_name", "equals": "3"}
    assert "class_name" in schema.METADATA.names
