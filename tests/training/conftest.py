import pytest


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Return the folder of a tiny random Llama with a tokenizer of single characters."""
    from training_cases import save_model

    return save_model(tmp_path_factory.mktemp("model") / "tiny")
