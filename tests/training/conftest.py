import pytest

from tests.tiny_models import tiny_model
from tests.training.test_trainer import make_trainer, weights


@pytest.fixture(scope="module")
def base():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def straight(request, base, tmp_path_factory):
    """Folder of an undisturbed run with the arguments `SAVING` of the test module, and its final weights."""
    folder = tmp_path_factory.mktemp("straight")
    trainer = make_trainer(base, folder, **request.module.SAVING)
    trainer.train()
    return folder, weights(trainer.model)
