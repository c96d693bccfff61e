"""The server of many tenants, against per-tenant models that share nothing with it but the base's weights."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import nn

from examples.tenants import server
from examples.tenants.load import load, swaps
from examples.tenants.server import application
from examples.tenants.store import RefusedError
from lightning_gcfreeze import delta
from tests.processes import tenants as tiny
from tests.processes.tenants import TEXT, TOKEN, own_delta, own_model, own_scores, served

NAMES = ("alice", "bob", "carol")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    """Three tenants at version 0; alice's classes have names."""
    folder = tmp_path / "tenants"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        delta.save(own_delta(number, 0), folder / f"{name}.safetensors")
    (folder / "alice.json").write_text('{"classes": ["<b>bold</b>", "&amp;", "plain"]}')
    return folder


@pytest.fixture
def made(folder):
    """Return the app of the folder, with some options."""
    return lambda token=TOKEN, **options: application(tiny.base(), tiny.encode, folder, token, **options)


@pytest.fixture
def port(made):
    with served(made()) as port:
        yield port


def call(port, method, path, body=None, token=TOKEN, headers=None):
    """Return the status and the JSON of one request."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    authorization = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        connection.request(method, path, body, authorization | (headers or {}))
        response = connection.getresponse()
        assert response.headers["Content-Type"] == "application/json"
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def ask(port, name, text=TEXT):
    status, answer = call(port, "POST", f"/tenants/{name}/answer", json.dumps({"text": text}), token=None)
    assert status == 200, answer
    return answer


def told(port, name):
    """Return what GET /tenants says of one tenant."""
    return {each["name"]: each for each in call(port, "GET", "/tenants")[1]}[name]


def packed(tenant, version, values_only=False):
    return delta.pack(own_delta(tenant, version), mask=own_delta(tenant, 0) if values_only else None)


def assert_same(ours, expected):
    assert ours == pytest.approx(
        expected, abs=1e-6
    )  # kernels may sum in another order where memory is aligned otherwise


def assert_versions(port, *versions):
    for number, (name, version) in enumerate(zip(NAMES, versions, strict=True)):
        assert_same(ask(port, name)["scores"], own_scores(number, version))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_answers_are_those_of_each_tenants_own_model(port):
    assert_versions(port, 0, 0, 0)
    assert_versions(port, 0, 0, 0)
    best = [max(range(3), key=own_scores(number, 0).__getitem__) for number in range(3)]
    assert ask(port, "alice")["label"] == ["<b>bold</b>", "&amp;", "plain"][best[0]]
    assert ask(port, "bob")["label"] == str(best[1])
    assert ask(port, "bob")["swap_ms"] == 0.0
    assert ask(port, "carol")["swap_ms"] > 0.0


def test_classes_of_the_app_are_those_of_tenants_without_others(made):
    with served(made(classes=["x", "y", "z"])) as port:
        assert told(port, "bob")["classes"] == ["x", "y", "z"]
        assert told(port, "alice")["classes"] == ["<b>bold</b>", "&amp;", "plain"]
        assert ask(port, "bob")["label"] in {"x", "y", "z"}


def test_listing_and_base_say_what_is_there(port, folder):
    ask(port, "bob")
    alice, bob = told(port, "alice"), told(port, "bob")
    assert alice["file_bytes"] == (folder / "alice.safetensors").stat().st_size
    assert (bob["requests"], bob["updates"], alice["requests"]) == (1, 0, 0)
    assert bob["swap_ms"] > 0.0
    assert alice["swap_ms"] is None
    live = sum(int((~frozen).sum()) for frozen in tiny.masks(0).values())
    assert alice["live_elements"] == live
    assert alice["memory_bytes"] >= 4 * live
    assert call(port, "GET", "/base") == (
        200,
        {
            "fingerprint": delta.fingerprint(tiny.base()),
            "elements": 32 * 8 + 8 * 3 + 3,
            "bytes": 4 * (32 * 8 + 8 * 3 + 3),
        },
    )


@pytest.mark.parametrize("values_only", [False, True])
def test_update_is_answered_from_at_once_and_after_a_restart(made, port, values_only):
    assert call(port, "POST", "/tenants/bob/update", packed(1, 1, values_only)) == (200, {"tenant": "bob"})
    assert_versions(port, 0, 1, 0)
    assert told(port, "bob")["updates"] == 1
    with served(made()) as restarted:
        assert_versions(restarted, 0, 1, 0)
        assert call(restarted, "POST", "/tenants/bob/update", packed(1, 2, values_only))[0] == 200
        assert_versions(restarted, 0, 2, 0)


def test_answers_during_updates_are_of_a_version_that_was_current(port):
    """Each answer is of a version acknowledged before the question was sent, or posted before the answer came."""
    last, count = 20, 60
    scores = [[own_scores(number, version) for version in range(last + 1)] for number in range(3)]
    posted, acknowledged, seen = [0] * 3, [0] * 3, [set(), set(), set()]

    def update(number):
        for version in range(1, last + 1):
            posted[number] = version
            body = packed(number, version, values_only=version % 2 == 0)
            assert call(port, "POST", f"/tenants/{NAMES[number]}/update", body)[0] == 200
            acknowledged[number] = version

    def question(seed):
        draw = random.Random(seed)
        for _ in range(count):
            number = draw.randrange(3)
            oldest = acknowledged[number]
            answer = ask(port, NAMES[number])["scores"]
            fits = [
                version
                for version in range(oldest, posted[number] + 1)
                if answer == pytest.approx(scores[number][version], abs=1e-6)
            ]
            assert fits, (NAMES[number], oldest, posted[number], answer)
            seen[number].update(fits)

    with ThreadPoolExecutor(6) as pool:
        for future in [
            *(pool.submit(update, number) for number in range(3)),
            *map(pool.submit, [question] * 3, range(3)),
        ]:
            future.result(timeout=60)
    assert_versions(port, last, last, last)
    assert max(map(len, seen)) > 1  # the updates did come in between
    assert sum(each["requests"] for each in call(port, "GET", "/tenants")[1]) == 3 * count + 3


def test_load_counts_wrong_answers_and_finds_none(port):
    texts = [TEXT, "something else", ""]
    expected = {name: {text: own_scores(number, 0, text) for text in texts[:2]} for number, name in enumerate(NAMES)}
    measured = load(port, expected, requests=100, threads=4)
    assert (measured.requests, measured.wrong) == (100, 0)
    assert 0 < measured.swaps <= 100
    assert 0.0 < measured.latency_ms[0] <= measured.latency_ms[1]
    assert "0 wrong answers" in str(measured)
    expected["bob"] = expected["alice"]
    assert load(port, expected, requests=100, threads=4).wrong > 10


def test_swaps_leave_the_base_to_the_bit():
    model = tiny.base()
    measured = swaps(model, {name: own_delta(number, 0) for number, name in enumerate(NAMES)}, times=300)
    assert measured.before == measured.after == delta.fingerprint(tiny.base()) == delta.fingerprint(model)
    assert measured.before != delta.fingerprint(own_model(0, 0))
    assert 0.0 < measured.swap_ms[0] <= measured.swap_ms[1]
    assert "the same to the bit" in str(measured)


def test_new_tenant_is_answered_for_and_stays_until_deleted(made, port, folder):
    assert call(port, "PUT", "/tenants/dave-2_?classes=a&classes=b&classes=c", packed(3, 0))[0] == 201
    assert_same(ask(port, "dave-2_")["scores"], own_scores(3, 0))
    with served(made()) as restarted:
        assert ask(restarted, "dave-2_")["label"] in {"a", "b", "c"}
    assert call(port, "DELETE", "/tenants/dave-2_")[0] == 200
    assert not list(folder.glob("dave*"))
    for method, path in (("POST", "/answer"), ("POST", "/update"), ("DELETE", "")):
        status, answer = call(port, method, f"/tenants/dave-2_{path}", json.dumps({"text": "a"}))
        assert (status, answer) == (404, {"error": "There is no tenant 'dave-2_'."})
    with served(made()) as restarted:
        assert call(restarted, "DELETE", "/tenants/dave-2_")[0] == 404
    assert call(port, "PUT", "/tenants/dave-2_", packed(3, 0))[0] == 201
    assert told(port, "dave-2_")["classes"] == []
    assert_versions(port, 0, 0, 0)


def test_taken_name_and_full_store_are_refused(made, folder):
    before = contents(folder)
    with served(made(max_tenants=3)) as port:
        status, answer = call(port, "PUT", "/tenants/alice", packed(0, 1))
        assert (status, answer["error"]) == (409, "There is a tenant 'alice': update or delete it.")
        status, answer = call(port, "PUT", "/tenants/dave", packed(3, 0))
        assert status == 409
        assert "There are 3 tenants, the most allowed" in answer["error"]
        assert_versions(port, 0, 0, 0)
        assert contents(folder) == before
        assert call(port, "DELETE", "/tenants/carol")[0] == 200
        assert call(port, "PUT", "/tenants/dave", packed(3, 0))[0] == 201


@pytest.mark.parametrize(("method", "path"), [("PUT", "/dave"), ("POST", "/alice/update"), ("DELETE", "/alice")])
@pytest.mark.parametrize("configured", [TOKEN, None, ""])
def test_change_without_the_token_is_refused(made, folder, method, path, configured):
    before = contents(folder)
    with served(made(token=configured)) as port:
        for token in (None, "", "a  token", "another", "a toke\xff"):
            status, answer = call(port, method, f"/tenants{path}", packed(0, 1), token)
            assert status == (401 if configured else 403)
            assert ("Authorization: Bearer TOKEN" if configured else "TENANTS_TOKEN") in answer["error"]
        basic = call(port, method, f"/tenants{path}", packed(0, 1), None, {"Authorization": f"Basic {TOKEN}"})
        assert basic[0] == (401 if configured else 403)
        assert_versions(port, 0, 0, 0)
    assert contents(folder) == before


@pytest.mark.parametrize("chunked", [False, True])
def test_too_long_a_body_is_refused_while_it_is_read(made, folder, chunked):
    before = contents(folder)
    with served(made(max_delta_bytes=20_000, max_text_bytes=100)) as port:
        for path, length in (("/tenants/alice/update", 20_001), ("/tenants/alice/answer", 101)):
            body = iter([b"x" * 50] * (length // 50 + 1)) if chunked else b"x" * length
            status, answer = call(port, "POST", path, body)
            assert status == 413
            assert answer["error"] == f"The body has more than {length - 1} bytes."
        assert call(port, "POST", "/tenants/alice/answer", json.dumps({"text": "x" * (100 - 12)}))[0] == 200
        assert_versions(port, 0, 0, 0)
    assert contents(folder) == before


def test_endless_body_is_answered_before_it_ends(made):
    with served(made(max_delta_bytes=1000)) as port:
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        connection.putrequest("POST", "/tenants/alice/update")
        connection.putheader("Authorization", f"Bearer {TOKEN}")
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        connection.send(b"400\r\n" + b"x" * 0x400 + b"\r\n")  # and no end
        assert connection.getresponse().status == 413
        connection.close()


def test_client_that_leaves_while_it_sends_changes_nothing(made, folder):
    before = contents(folder)
    with served(made()) as port:
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        connection.putrequest("POST", "/tenants/alice/update")
        connection.putheader("Authorization", f"Bearer {TOKEN}")
        connection.putheader("Content-Length", str(len(packed(0, 1))))
        connection.endheaders()
        connection.send(packed(0, 1)[:-1])
        connection.close()
        assert_versions(port, 0, 0, 0)
        assert told(port, "alice")["updates"] == 0
    assert contents(folder) == before


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "%2e%2e",
        "..%2fdave",
        "%2fetc%2fdave",
        "..%5cdave",
        "a.b",
        "A",
        "d%00",
        "d%0a",
        "%c3%a9",
        "d e",
        "x" * 65,
    ],
)
def test_name_that_could_be_a_path_is_refused(port, folder, tmp_path, name):
    before, outside = contents(folder), sorted(tmp_path.iterdir())
    name = name.replace(" ", "%20")
    assert call(port, "PUT", f"/tenants/{name}", packed(3, 0))[0] in {400, 404}
    assert call(port, "POST", f"/tenants/{name}/update", packed(3, 0))[0] == 404
    assert call(port, "POST", f"/tenants/{name}/answer", '{"text": "a"}')[0] == 404
    assert call(port, "DELETE", f"/tenants/{name}")[0] == 404
    assert contents(folder) == before
    assert sorted(tmp_path.iterdir()) == outside


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"\xff", b"[]", b"{}", b"null", b'"text"', b'{"text": 1}', b'{"text": ["a"]}', b'{"text": null}'),
        *(b'{"text": "\\ud800"}', b"[" * 16_000, b'{"text": ' + b"9" * 16_000 + b"}"),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_bad_question_is_refused(port, body):
    assert call(port, "POST", "/tenants/alice/answer", body) == (
        400,
        {"error": 'The body must be {"text": "..."} in JSON.'},
    )
    assert told(port, "alice")["requests"] == 0


def test_unknown_paths_and_methods_are_answered_in_json(port):
    assert call(port, "GET", "/nothing") == (404, {"error": "Not Found"})
    assert call(port, "PATCH", "/tenants/alice") == (405, {"error": "Method Not Allowed"})
    assert call(port, "GET", "/tenants/alice/update") == (405, {"error": "Method Not Allowed"})


def flipped(body, at):
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]


def of_other_model():
    model = nn.Sequential(nn.EmbeddingBag(32, 8), nn.Linear(8, 4))
    return delta.pack(
        delta.of(model, {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()})
    )


def of_other_base():
    model = own_model(0, 1)
    with torch.no_grad():
        model[0].weight += 1.0
    return delta.pack(delta.of(model, tiny.masks(0)))


BAD = {
    "empty": lambda: b"",
    "no file": lambda: b"x" * 1000,
    "cut": lambda: packed(0, 1)[:-1],
    "longer": lambda: packed(0, 1) + b"\0",
    "first byte": lambda: flipped(packed(0, 1), 0),
    "header": lambda: flipped(packed(0, 1), packed(0, 1).rindex(b"data_offsets") + 16),
    "middle": lambda: flipped(packed(0, 1), len(packed(0, 1)) // 2),
    "last byte": lambda: flipped(packed(0, 1), -1),
    "values of another mask": lambda: packed(1, 1, values_only=True),
    "damaged values": lambda: flipped(packed(0, 1, values_only=True), -1),
    "another model": of_other_model,
    "another base": of_other_base,
}


@pytest.mark.parametrize("kind", BAD)
def test_delta_that_is_damaged_or_does_not_fit_changes_nothing(port, folder, kind):
    before, body = contents(folder), BAD[kind]()
    for method, path in (("POST", "/tenants/alice/update"), ("PUT", "/tenants/dave")):
        status, answer = call(port, method, path, body)
        assert status == 422, answer
        assert len(answer["error"]) > 10
        assert "Traceback" not in answer["error"]
    assert contents(folder) == before
    assert told(port, "alice")["updates"] == 0
    assert_versions(port, 0, 0, 0)
    assert call(port, "POST", "/tenants/alice/update", packed(0, 1))[0] == 200
    assert_versions(port, 1, 0, 0)


def numbered(tenant, version):
    """Return an update as a stream sends it."""
    return delta.pack(own_delta(tenant, version) | {"number": torch.tensor(version)})


def test_update_out_of_order_is_refused(made, port, folder):
    assert call(port, "POST", "/tenants/alice/update", numbered(0, 5))[0] == 200
    before = contents(folder)
    with served(made()) as restarted:
        for each in (port, restarted):
            for version in (4, 5):
                status, answer = call(each, "POST", "/tenants/alice/update", numbered(0, version))
                assert (status, contents(folder)) == (409, before)
                assert "after update 5" in answer["error"]
            assert_versions(each, 5, 0, 0)
    assert call(port, "POST", "/tenants/alice/update", numbered(0, 6))[0] == 200
    assert_versions(port, 6, 0, 0)


def test_numbered_update_that_cannot_be_written_is_taken_back_with_its_number(port, monkeypatch):
    assert call(port, "POST", "/tenants/alice/update", numbered(0, 5))[0] == 200
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    assert call(port, "POST", "/tenants/alice/update", numbered(0, 6))[0] == 500
    monkeypatch.undo()
    assert_versions(port, 5, 0, 0)
    assert call(port, "POST", "/tenants/alice/update", numbered(0, 4))[0] == 409
    assert call(port, "POST", "/tenants/alice/update", numbered(0, 6))[0] == 200
    assert_versions(port, 6, 0, 0)


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 507), (errno.EIO, 500)])
def test_delta_that_cannot_be_written_is_taken_back(port, folder, monkeypatch, function, number, status):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    before = contents(folder)
    monkeypatch.setattr(os, function, fail)
    for method, path, body in (("POST", "alice/update", packed(0, 1)), ("PUT", "dave", packed(3, 0))):
        answer = {"error": f"Nothing changed: {os.strerror(number)}."}
        assert call(port, method, f"/tenants/{path}", body) == (status, answer)
    assert contents(folder) == before
    assert_versions(port, 0, 0, 0)
    assert call(port, "POST", "/tenants/dave/answer", '{"text": "a"}')[0] == 404
    monkeypatch.undo()
    assert call(port, "POST", "/tenants/alice/update", packed(0, 1))[0] == 200
    assert call(port, "PUT", "/tenants/dave", packed(3, 0))[0] == 201
    assert_versions(port, 1, 0, 0)


def test_file_is_synced_before_it_is_renamed_and_the_folder_before_the_answer(port, folder, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda opened: (order.append(os.readlink(f"/proc/self/fd/{opened}")), fsync(opened))
    )
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append((str(old), str(new))), replace(old, new)))
    assert call(port, "POST", "/tenants/alice/update", packed(0, 1))[0] == 200
    (temporary, (old, new), synced) = order
    assert temporary == old
    assert Path(old).parent == folder
    assert new == str(folder / "alice.safetensors")
    assert synced == str(folder)


def test_leftovers_are_removed_at_the_start(made, folder):
    (folder / ".alice.safetensors.1234.tmp").write_bytes(b"half")
    made()
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        [*(f"{n}.safetensors" for n in NAMES), "alice.json"]
    )


def test_damaged_folder_is_refused_at_the_start(made, folder):
    for broken in ('{"classes": "abc"}', '{"classes": [1]}', "{}", "[]", "["):
        (folder / "alice.json").write_text(broken)
        with pytest.raises(RefusedError, match=r"alice\.json must be"):
            made()
    (folder / "alice.json").unlink()
    (folder / "bob.safetensors").write_bytes(packed(1, 0)[:-1])
    with pytest.raises(delta.DeltaError):
        made()
    (folder / "bob.safetensors").rename(folder / "Bob.safetensors")
    with pytest.raises(RefusedError, match="'Bob'"):
        made()


class Failing(nn.Module):
    def forward(self, tokens):
        raise RuntimeError("a secret")


def test_failing_model_tells_clients_nothing(tmp_path):
    app = application(Failing(), tiny.encode, tmp_path / "new", TOKEN)
    with served(app) as port:
        assert call(port, "PUT", "/tenants/a", delta.pack({"format": own_delta(0, 0)["format"]}))[0] == 201
        assert call(port, "POST", "/tenants/a/answer", '{"text": "a"}') == (
            500,
            {"error": "The server failed; its log says how."},
        )


def test_weights_without_numbers_are_an_error(port):
    model = own_model(0, 1)
    with torch.no_grad():
        model[1].bias[~tiny.masks(0)["1.bias"]] = float("nan")
        model[1].weight[~tiny.masks(0)["1.weight"]] = float("nan")
    assert call(port, "POST", "/tenants/alice/update", delta.pack(delta.of(model, tiny.masks(0))))[0] == 200
    status, answer = call(port, "POST", "/tenants/alice/answer", '{"text": "a"}')
    assert (status, answer["error"]) == (500, "The weights of 'alice' give scores that are no numbers.")
    assert_same(ask(port, "bob")["scores"], own_scores(1, 0))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "somewhere.example"])
def test_host_that_others_can_reach_needs_a_token(host, capsys, monkeypatch):
    monkeypatch.delenv("TENANTS_TOKEN", raising=False)
    monkeypatch.setattr(server, "built", lambda: pytest.fail("went on"))
    with pytest.raises(SystemExit) as exit:
        server.main(["--host", host])
    assert exit.value.code == 2
    assert f"--host {host} can be reached from elsewhere: set a --token, or TENANTS_TOKEN." in capsys.readouterr().err


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_command_line_serves_a_folder(folder, host, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(server, "built", lambda: (tiny.base(), tiny.encode, "abc"))
    monkeypatch.setattr(server.uvicorn, "run", lambda app, **options: ran.append(options))
    server.main(["--folder", str(folder), "--host", host, "--port", "1"])
    assert (ran[0]["host"], ran[0]["port"]) == (host, 1)
    (folder / "bob.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit) as exit:
        server.main(["--folder", str(folder)])
    assert exit.value.code == 1
    assert str(folder) in capsys.readouterr().err


@contextmanager
def ending(process):
    """Kill a process and its forks at the end, else a failing test would wait for them."""
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_killed_server_has_every_acknowledged_update_and_nothing_half_written(folder):
    """Twenty kills at random moments of continuous updates: a file is of the last acknowledged version or the next."""
    draw, current, in_flight, taken = random.Random(0), [0, 0, 0], 0, 0
    program = [sys.executable, "-m", "tests.processes.tenants", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"stdin": -1, "stdout": -1, "text": True, "cwd": ROOT, "env": environment, "start_new_session": True}
    with subprocess.Popen(program, **options) as forking, ending(forking):

        def start():
            forking.stdin.write("\n")
            forking.stdin.flush()
            return map(int, forking.stdout.readline().split())

        def update(port, number, stop):
            """Return the last version that was acknowledged, and the last that was posted."""
            version = current[number]
            while not stop.is_set():
                body = packed(number, version + 1, values_only=bool(version % 2))
                try:
                    status, _ = call(port, "POST", f"/tenants/{NAMES[number]}/update", body)
                except (OSError, HTTPException):
                    return version, version + 1
                assert status == 200
                version += 1
            return version, version

        for _ in range(20):
            process, port = start()
            assert_versions(port, *current)
            assert not list(folder.glob(".*"))
            stop = Event()
            with ThreadPoolExecutor(3) as pool:
                updates = [pool.submit(update, port, number, stop) for number in range(3)]
                time.sleep(draw.uniform(0.02, 0.3))
                os.kill(process, signal.SIGKILL)
                stop.set()
                ends = [each.result(timeout=30) for each in updates]
            for number, (acknowledged, posted) in enumerate(ends):
                on_disk = delta.load(folder / f"{NAMES[number]}.safetensors")
                fits = [
                    version
                    for version in {acknowledged, posted}
                    if all(torch.equal(on_disk[key], t) for key, t in own_delta(number, version).items())
                ]
                assert len(fits) == 1, (NAMES[number], acknowledged, posted)
                in_flight += posted > acknowledged
                taken += acknowledged - current[number]
                current[number] = fits[0]
        _, port = start()
        assert_versions(port, *current)
    assert taken > 60
    assert in_flight > 10  # the kills did hit updates


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_page_shows_tenants_answers_and_updates(made, port, tmp_path):
    def dom(path):
        program = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        program += ["--virtual-time-budget=4000", "--dump-dom", f"http://127.0.0.1:{port}{path}"]
        return subprocess.run(program, capture_output=True, text=True, timeout=120, check=True).stdout

    seen = dom(f"/?text={TEXT.replace(' ', '+')}")
    assert delta.fingerprint(tiny.base()) in seen
    for name in NAMES:
        assert f">{name}</td>" in seen
        assert f'<option value="{name}">{name}</option>' in seen
        assert f'<span class="quiet">{name}</span><b>' in seen
    label = ["&lt;b&gt;bold&lt;/b&gt;", "&amp;amp;", "plain"][max(range(3), key=own_scores(0, 0).__getitem__)]
    assert f"<b>{label}</b>" in seen
    assert "flash" not in seen.split("<tbody", 1)[1].split("</tbody>")[0]

    done = Event()

    def update():
        for version in range(1, 10_000):
            if done.is_set():
                return version
            assert call(port, "POST", "/tenants/bob/update", packed(1, version))[0] == 200
        return 0

    with ThreadPoolExecutor(1) as pool:
        updating = pool.submit(update)
        try:
            table = dom("/").split("<tbody", 1)[1].split("</tbody>")[0]
        finally:
            done.set()
        assert updating.result() > 1
    flashing = [row for row in table.split("<tr") if 'class="flash"' in row]
    assert len(flashing) == 1
    assert ">bob</td>" in flashing[0]


def test_page_allows_only_its_own_script_and_style(port):
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/")
    response = connection.getresponse()
    page = response.read().decode()
    connection.close()
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2
    assert "http" not in page.replace("http-equiv", "")
    assert "innerHTML" not in page
