"""POST /v1/embeddings by OpenAI's own client."""

import numpy as np
import pytest
from conftest import FP32, ROOT, succeed

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


@pytest.mark.parametrize("given, error, message", [
    ({"input": ["短", "长" * 40]}, "BadRequestError", "input 1: has more than 32 tokens"),
    ({"input": []}, "BadRequestError", "body.input"), ({"input": ""}, "BadRequestError", "body.input"),
    ({"input": [1, 2, 3]}, "BadRequestError", "body.input"), ({"input": ["a"] * 65}, "BadRequestError", "body.input"),
    ({"input": "a", "dimensions": 64}, "BadRequestError",
     "body.dimensions: Input should be greater than or equal to 128"),
    ({"input": "a", "dimensions": 129}, "BadRequestError", "body.dimensions"),
    ({"input": "a" * 2001}, "BadRequestError", "body.input"),
    ({"input": "a", "extra_body": {"input_type": "query"}}, "BadRequestError", "body.input_type"),
    ({"input": "长" * 500_000}, "APIStatusError", "a body may have 1,048,576 bytes")])
def test_errors_have_openais_form(service, given, error, message):
    with pytest.raises(getattr(openai, error)) as found:
        client(service).embeddings.create(model="m", **given)
    assert message in found.value.body["message"] and "\n" not in found.value.body["message"]
    assert found.value.body["type"] == "invalid_request_error" and found.value.status_code in (400, 413)


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
