"""The search service and what it does not answer: the wrong, the too large, the too slow and the too many."""

import gzip
import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi_offline", reason="requirements-serving.txt is not installed")
BLANK = [character for character in map(chr, range(0x110000)) if character.isspace()]


def is_one_line(content):
    assert list(content) == ["error"] and content["error"].strip() and len(content["error"]) < 200
    assert content["error"].isprintable()
    return content["error"]


def still_answers(service):
    assert service.process.poll() is None
    assert service.ask("/embed", {"texts": ["a"]})[0] == 200
    assert "Traceback" not in service.log.read_text(encoding="utf-8")


def connect(service):
    return socket.create_connection(("127.0.0.1", int(service.address.rsplit(":")[-1])), timeout=60)


def said(connection):
    """The status of an answer, and its content as JSON."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.status, json.loads(answer.read())


@pytest.mark.parametrize("body", [
    b"", b"{", b"null", b"[]", b'"texts"', b"texts=a", b'{"texts": ["a"]', b'{"texts": ["a\x00b"]}',
    b"[" * 100_000, b'{"texts":' * 50_000, b'{"texts": ' + b"[" * 200 + b"]" * 200 + b"}", b"9" * 100_000,
    b'{"texts": [' + b"9" * 5000 + b"]}", b'{"texts": [NaN]}', b'{"texts": [Infinity]}', b'{"texts": [-1e999]}',
    '{"texts": ["语义"]}'.encode("gbk"), b'{"texts": ["\xff\xfe"]}', b'{"texts": ["\xed\xa0\x80"]}', b"\x80\x04N.",
    b'{"texts": ["\\ud800"]}', b'{"texts": ["a\\udfffb"]}', b'{"\\ud800": 1, "texts": ["a"]}'],
    ids=lambda body: ascii(body[:20])[2:-1])
def test_what_is_no_json_or_no_text(service, body):
    status, _, content = service.ask("/embed", body)
    assert status in (400, 422)
    is_one_line(content)
    still_answers(service)


@pytest.mark.parametrize("path, body", [("/embed", '{"texts": ["语义"]}'), ("/search", '{"queries": ["语义"]}'),
                                        ("/similarity", '{"pairs": [["语义", "检索"]]}')])
def test_the_cause_is_named_of_a_body_that_is_not_read(service, path, body):
    """No Content-Type, which urllib would add; that of a form, as `curl -d` adds it; GBK, of Windows; no JSON."""
    def refused(content, kind="application/json"):
        connection = http.client.HTTPConnection("127.0.0.1", int(service.address.rsplit(":")[-1]), timeout=60)
        connection.request("POST", path, content, {"Content-Type": kind} if kind else {})
        answer = connection.getresponse()
        return answer.status, is_one_line(json.loads(answer.read()))

    needed, start = "Content-Type: application/json is needed, the request has ", body.index("语") + 1
    assert refused(body.encode(), None) == (422, f"{needed}none")
    for kind in ("application/x-www-form-urlencoded", "text/plain; charset=utf-8", "json"):
        assert refused(body.encode(), kind) == (422, needed + kind)
    assert refused(body.encode(), "x/\xe9\t" + "y" * 9999)[1].startswith(f"{needed}x/")
    for kind in ("application/json", "application/json; charset=gbk"):
        assert refused(body.encode("gbk"), kind) == (
            400, f"the body is not UTF-8 at byte {start}; it looks like GBK; send it as UTF-8")
    assert refused(body.replace("语", "\udcff").encode(errors="surrogateescape")) == (
        400, f"the body is not UTF-8 at byte {start}; JSON is sent as UTF-8")
    assert refused(body.replace("[", "[,").encode()) == (
        422, f"body.{body.index('[') + 1}: JSON decode error: Expecting value")


@pytest.mark.parametrize("path, body, where", [
    ("/embed", {}, "body.texts: "), ("/embed", {"texts": "a"}, "body.texts: "), ("/embed", {"texts": []}, "body.texts"),
    ("/embed", {"texts": ["a", 1]}, "body.texts.1: "), ("/embed", {"texts": [None]}, "body.texts.0: "),
    ("/embed", {"texts": [True]}, "body.texts.0: "), ("/embed", {"texts": [["a"]]}, "body.texts.0: "),
    ("/embed", {"texts": [""]}, "body.texts.0: "), ("/embed", {"texts": {"0": "a"}}, "body.texts: "),
    ("/embed", {"texts": ["a"] * 65}, "body.texts: "), ("/embed", {"texts": ["长" * 2001]}, "body.texts.0: "),
    ("/embed", {"texts": ["a"], "top_k": 3}, "body.top_k: "),
    ("/embed", {"texts": ["a"], "a\n\x1b\u202e": 3}, "body.a\\n\\x1b\\u202e: "),
    ("/embed", {"texts": ["a"], "b" * 5000: 3}, "body.bbb"),
    ("/similarity", {"pairs": [["a"]]}, "body.pairs.0: "), ("/similarity", {"pairs": [["a", "b", "c"]]}, "body.pairs"),
    ("/similarity", {"pairs": [["a", " "]]}, "body.pairs.0.1: "), ("/similarity", {"pairs": ["ab"]}, "body.pairs.0: "),
    ("/similarity", {"pairs": [["a", "b"]] * 65}, "body.pairs: "),
    ("/search", {"texts": ["a"]}, "body.queries: "), ("/search", {"queries": ["a"] * 65}, "body.queries: "),
    *(("/search", {"queries": ["a"], "top_k": top_k}, "body.top_k: ")
      for top_k in (0, -1, 101, 10**400, -10**400, 3.5, "3", True, None, [3], float("nan"), float("inf")))],
    ids=lambda value: ascii(value)[:40] if isinstance(value, dict) else "")
def test_what_is_not_asked_for_is_refused_by_name(service, path, body, where):
    status, _, content = service.ask(path, body)
    assert status == 422 and is_one_line(content).startswith(where)


def test_blank_is_what_strip_takes_away(service):
    for text in [*BLANK, "".join(BLANK)]:
        status, _, content = service.ask("/embed", {"texts": ["a", text]})
        assert status == 422 and content["error"] == "body.texts.1: String should not be blank", ascii(text)
    assert service.ask("/embed", {"texts": [f"{text}a" for text in BLANK] + ["\x00", "a\x00b", "\u200b", "\ufeff"]}
                       )[0] == 200
    with_nul, without = service.ask("/embed", {"texts": ["语\x00义", "语义"]})[2]["embeddings"]
    assert with_nul == pytest.approx(without, abs=1e-6), "the tokenizer leaves it out"


def test_the_largest_that_is_allowed(service):
    assert service.ask("/embed", {"texts": [f"{n}{'长' * 1990}" for n in range(64)]})[0] == 200
    assert service.ask("/embed", json.dumps({"texts": ["a"]}).encode().ljust(8 << 20))[0] == 200


def test_paths_and_methods_that_are_not_there(service):
    for path, body, status in (("/nothing", None, 404), ("/embed", None, 405), ("/healthz", {}, 405),
                               ("/x" * 999, {}, 404)):
        found, headers, content = service.ask(path, body)
        assert found == status and is_one_line(content) and (status == 404 or headers["Allow"])


@pytest.mark.parametrize("size", [(8 << 20) + 1, 60 << 20])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_told_so(service, size, chunked):
    """Read to its end, so that a client that sends all of it before it listens gets the answer, each time."""
    for _ in range(3):
        connection = http.client.HTTPConnection("127.0.0.1", int(service.address.rsplit(":")[-1]), timeout=60)
        body = b" " * size
        pieces = (body[start : start + 65536] for start in range(0, size, 65536))
        connection.request("POST", "/embed", pieces if chunked else body, {"Content-Type": "application/json"},
                           encode_chunked=chunked)
        answer = connection.getresponse()
        assert answer.status == 413 and is_one_line(json.loads(answer.read())) == "a body may have 8,388,608 bytes"
        connection.close()
    still_answers(service)


def test_a_compressed_body_is_refused(service):
    status, _, content = service.ask("/embed", gzip.compress(b'{"texts": ["a"]}'), **{"Content-Encoding": "gzip"})
    assert (status, content) == (415, {"error": "Content-Encoding: gzip is not supported; send the body uncompressed"})


def test_head_is_get_without_its_body(service):
    for path in ("/", "/healthz", "/page/page.js"):
        connection = http.client.HTTPConnection("127.0.0.1", int(service.address.rsplit(":")[-1]), timeout=60)
        connection.request("HEAD", path)
        answer = connection.getresponse()
        assert answer.status == 200 and int(answer.headers["Content-Length"]) and not answer.read()


def test_a_body_without_end(service):
    """Refused before it comes, by its length; and while it comes, without one."""
    with connect(service) as connection:
        connection.sendall(b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000000\r\n\r\n")
        assert said(connection)[0] == 413
    sent = 0
    with connect(service) as connection, pytest.raises(OSError):
        connection.sendall(b"POST /embed HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        while sent < 1 << 30:
            connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
            sent += 65536
    assert 8 << 20 < sent < 1 << 27
    still_answers(service)


def test_what_is_no_http(service):
    for sent in (b"\x16\x03\x01\x02\x00\x01\x00" * 9, b"nothing\r\n\r\n",
                 b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
                 b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
                 b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nContent-Length: 8\r\n\r\n",
                 b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 2_000_000):
        with connect(service) as connection:
            try:
                connection.sendall(sent)
                assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
            except ConnectionError:  # it had read enough
                pass
    for sent in (b"POST /embed", b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{"):
        with connect(service) as connection:  # gone in the middle
            connection.sendall(sent)
    still_answers(service)


@pytest.fixture(scope="module")
def many(exported, kept_index, tmp_path_factory):
    """A service that lets one request be long, and has no patience with a body and with many of them."""
    from conftest import Service

    running = Service(tmp_path_factory.mktemp("many"), "--model_dir", exported, "--index_path", kept_index,
                      "--max_texts", 4000, "--max_seconds", 1, "--max_waiting", 8, "--max_batch", 8)
    yield running
    running.stop()


def long_request(count=4000):
    """A request that takes some seconds."""
    return {"texts": [f"第{row}个对象,数据经统计软件处理后作进一步比较,为临床工作提供参考" for row in range(count)]}


def until_answered(service):
    """Ask until the service has time again."""
    end = time.monotonic() + 60
    while service.ask("/embed", {"texts": ["a"]})[0] != 200:
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("head", ["Content-Length: 20", "Transfer-Encoding: chunked"])
def test_a_body_that_comes_too_slowly(many, head):
    with connect(many) as connection:
        connection.sendall(f"POST /embed HTTP/1.1\r\nHost: a\r\n{head}\r\n\r\n".encode())
        end = time.monotonic() + 30
        connection.settimeout(0.2)
        status = None
        while not status and time.monotonic() < end:  # a byte now and then does not help
            try:
                connection.sendall(b"1\r\n{\r\n" if "chunked" in head else b"{")
                connection.recv(1, socket.MSG_PEEK)
                status, content = said(connection)
            except TimeoutError:
                pass
    assert status == 408 and is_one_line(content) == "the body did not come within 1 s"
    still_answers(many)


def test_an_answer_that_takes_too_long(many):
    status, _, content = many.ask("/embed", long_request())
    assert status == 504 and is_one_line(content) == "no answer within 1 s"
    assert many.ask("/healthz")[0] == 200
    until_answered(many)
    still_answers(many)


def test_overload(serve):
    """While one request is computed 8 texts may wait: what comes then is told to try again, all else is answered."""
    service = serve("--max_texts", 4000, "--max_waiting", 8, "--max_batch", 8, "--max_seconds", 120)
    expected, ready = service.ask("/embed", {"texts": ["甲", "乙"]})[2]["embeddings"], threading.Barrier(24)
    with ThreadPoolExecutor(25) as clients:
        long = clients.submit(service.ask, "/embed", long_request())
        while service.figures()["simcse_batch_requests_count"] < 2:
            time.sleep(0.02)

        def client(_):
            ready.wait(60)
            return service.ask("/embed", {"texts": ["甲", "乙"]})

        few = [clients.submit(client, n) for n in range(24)]
        while service.figures().get('simcse_requests_total{path="/embed",status="503"}', 0) < 20:
            assert not long.done()
            time.sleep(0.02)
        assert service.ask("/healthz")[0] == 200 and service.figures()["simcse_waiting_texts"] == 8
        found = [each.result(120) for each in few]
        assert long.result(120)[0] == 200 and len(long.result()[2]["embeddings"]) == 4000
    assert sorted(status for status, _, _ in found) == [200] * 4 + [503] * 20
    for status, headers, content in found:
        if status == 503:
            assert headers["Retry-After"] == "1" and is_one_line(content)
        else:
            assert sum(content["embeddings"], []) == pytest.approx(sum(expected, []), abs=1e-5)
    still_answers(service)
    assert service.figures()["simcse_waiting_texts"] == 0


def test_a_hundred_clients_at_once(many):
    """Whatever each gets is an answer."""
    ready = threading.Barrier(100)

    def client(n):
        ready.wait(60)
        return [many.ask("/search", {"queries": [f"{n} {turn}", "a"]})[0] for turn in range(5)]

    with ThreadPoolExecutor(100) as clients:
        found = {status for each in clients.map(client, range(100)) for status in each}
    assert 200 in found and found <= {200, 503, 504}
    until_answered(many)
    still_answers(many)
