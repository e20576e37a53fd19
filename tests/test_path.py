"""A user's whole way on a tiny set, by the real commands."""

import pytest

import user_path


@pytest.mark.slow
def test_from_a_download_to_a_training_on_its_cache(tmp_path):
    """Digits as ImageNet folders, packed into tars, cached, trained; `go` compares the weights with those of
    a training that encodes in each step.
    """
    rows = user_path.go("digits", tmp_path / "digits", user_path.SMALL)
    assert [what for what, _ in rows] == [
        "prepare digits",
        "prepare imagenet",
        "verify",
        "scan",
        "shards",
        "verify",
        "cache latents",
        "train flow_dit",
        "train flow_dit",
    ]
    with pytest.raises(SystemExit, match="gave other weights"):
        path = next((tmp_path / "digits/online").glob("checkpoints/step-*/model.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        user_path.compare("digits", tmp_path / "digits")
