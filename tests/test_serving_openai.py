"""POST /v1/embeddings by OpenAI's own client."""

from deploy.serving.openai_api import check_input

import numpy as np
import pytest
from conftest import FP32, ROOT, succeed
from test_python_page import blocks

openai = pytest.importorskip("openai", reason="requirements-dev.txt is not installed")

TEXTS = ["语义检索", "向量召回", "语义检索", "国有企业引入非国有资本"]


def client(service, token="any"):
    return openai.OpenAI(base_url=f"{service.address}/v1", api_key=token, max_retries=0)


def embedded(service, texts):
    return np.array(service.ask("/embed", {"texts": texts})[2]["embeddings"], "float32")


def test_strings_and_lists_as_floats_and_as_base64(service):
    """The client asks for base64 where it is told nothing; a text alone and one in a list are the same."""
    ours = client(service).embeddings
    found = ours.create(model="m", input=TEXTS)
    assert [each.index for each in found.data] == [0, 1, 2, 3] and found.model == "m" and found.object == "list"
    np.testing.assert_allclose([each.embedding for each in found.data], embedded(service, TEXTS), atol=1e-6)
    floats = ours.create(model="m", input=TEXTS, encoding_format="float")
    np.testing.assert_array_equal([each.embedding for each in floats.data], [each.embedding for each in found.data])
    one = ours.create(model="m", input=TEXTS[0], user="u")
    np.testing.assert_allclose(one.data[0].embedding, found.data[0].embedding, atol=1e-6)
    assert one.usage.prompt_tokens == one.usage.total_tokens == len(TEXTS[0]) + 2  # [CLS], a token a character, [SEP]
    assert found.usage.total_tokens == sum(len(text) + 2 for text in TEXTS)


@pytest.mark.parametrize("page", ["README.md", "README_en.md", "docs/zh/deployment.md", "docs/en/deployment.md"])
def test_the_code_of_the_pages(service, page, capsys):
    block, = [block for block in blocks(page) if "from openai" in block]
    address = "http://127.0.0.1:8000"
    assert address in block
    exec(block.replace(address, service.address), {})
    assert capsys.readouterr().out


TOKEN_IDS = "holds token ids, of a tokenizer that is not this model's; send texts"


@pytest.mark.parametrize("given, error, message", [
    ({"input": ["短", "长" * 40]}, "BadRequestError", "input 1: has more than 32 tokens"),
    ({"input": ["短"] * 100 + ["长" * 40]}, "BadRequestError", "input 100: has more than 32 tokens"),
    ({"input": []}, "BadRequestError", "body.input: is an empty list; send at least one text"),
    ({"input": ""}, "BadRequestError", "body.input: number 0 is an empty text"),
    ({"input": ["a", "\u3000"]}, "BadRequestError", "body.input: number 1 is blank"),
    ({"input": ["a", None]}, "BadRequestError", "body.input: number 1 is no text"),
    ({"input": {"text": "a"}}, "BadRequestError", "body.input: should be a text or a list of texts"),
    ({"input": [1, 2, 3]}, "BadRequestError", TOKEN_IDS), ({"input": [[1, 2, 3]]}, "BadRequestError", TOKEN_IDS),
    ({"input": ["a"] * 2049}, "BadRequestError", "body.input: has 2,049 texts, and a request may have 2,048"),
    ({"input": "a", "dimensions": 64}, "BadRequestError",
     "body.dimensions: Input should be greater than or equal to 128"),
    ({"input": "a", "dimensions": 129}, "BadRequestError", "body.dimensions"),
    ({"input": "长" * 500_000}, "BadRequestError", "input 0: has more than 32 tokens"),
    ({"input": "a", "extra_body": {"input_type": "title"}}, "BadRequestError", "body.input_type"),
    ({"input": "长" * 3_000_000}, "APIStatusError", "a body may have 8,388,608 bytes")],
    ids=lambda value: ascii(value)[:40] if isinstance(value, dict) else "")
def test_errors_have_openais_form(service, given, error, message):
    with pytest.raises(getattr(openai, error)) as found:
        client(service).embeddings.create(model="m", **given)
    assert message in found.value.body["message"] and "\n" not in found.value.body["message"]
    assert found.value.body["type"] == "invalid_request_error" and found.value.status_code in (400, 413)


def test_half_a_surrogate_pair_is_refused():
    """JSON's escapes can have one."""
    with pytest.raises(ValueError, match="number 1 is not valid Unicode"):
        check_input(["a", "\ud800"])


def test_as_many_texts_as_openai_takes(service):
    """In batches, one after the other; llama_index sends 100, LangChain 1,000."""
    texts = [TEXTS[number % 4] for number in range(2048)]
    found = client(service).embeddings.create(model="m", input=texts)
    assert [each.index for each in found.data] == list(range(2048))
    np.testing.assert_allclose([each.embedding for each in found.data], np.tile(embedded(service, TEXTS), (512, 1)),
                               atol=1e-6)
    assert found.usage.total_tokens == 512 * sum(len(text) + 2 for text in TEXTS)


def test_null_is_the_default(service):
    body = {"input": "语义检索", "model": None, "encoding_format": None, "dimensions": None, "user": None}
    status, _, content = service.ask("/v1/embeddings", body)
    assert status == 200 and content["model"] == "simcse" and len(content["data"][0]["embedding"]) == 128


def test_models(service):
    assert [model.id for model in client(service).models.list()] == ["simcse"]
    assert client(service).models.retrieve("any").id == "simcse"


def test_the_whole_size_may_be_asked_for(service):
    assert len(client(service).embeddings.create(model="m", input="a", dimensions=128).data[0].embedding) == 128


def test_token(serve):
    service = serve(env={"SIMCSE_TOKEN": "geheim"})
    assert client(service, "geheim").embeddings.create(model="m", input="a").data
    with pytest.raises(openai.AuthenticationError) as found:
        client(service, "another").embeddings.create(model="m", input="a")
    assert "Authorization: Bearer and the token" in found.value.body["message"]


def test_a_whitened_checkpoint_is_shortened(sample, serve, tmp_path):
    """The first numbers are the directions of largest variance: those of `--whiten SIZE` itself."""
    train = ["train.py", "--device", "cpu", "--epochs", 0, "--model_name_or_path",
             ROOT / "pretrained" / "ernie_mini_zh", "--pooling", "first_avg", "--max_seq_length", 32,
             "--train_set_file", sample / "train_unsupervised.csv"]
    for size in (0, 16):
        succeed(*train, "--whiten", size, "--save_dir", tmp_path / str(size), cwd=tmp_path)
    checkpoint = tmp_path / "0" / "model_0_whitened"
    succeed("export_model.py", "--params_path", checkpoint, "--output_path", tmp_path / "output", cwd=tmp_path)
    succeed("recall.py", "--device", "cpu", "--params_path", checkpoint, "--corpus_file", sample / "corpus.csv",
            "--query", "a", "--index_path", tmp_path / "index", *FP32, cwd=tmp_path)
    service = serve("--model_dir", tmp_path / "output", "--index_path", tmp_path / "index")
    found = client(service).embeddings.create(model="m", input=TEXTS, dimensions=16)
    (tmp_path / "texts").write_text("\n".join(TEXTS), encoding="utf-8")
    succeed("inference.py", "--device", "cpu", "--params_path", tmp_path / "16" / "model_0_whitened", *FP32,
            "--input_file", tmp_path / "texts", "--output_file", tmp_path / "v.npy", cwd=tmp_path)
    np.testing.assert_allclose([each.embedding for each in found.data], np.load(tmp_path / "v.npy"), atol=1e-4)
