"""What holds for every test: markers for machines and sizes, and fresh random numbers that a rerun can repeat."""

import os

import pytest
import torch

# Without a GPU, Triton kernels run in Triton's interpreter. It must be asked for before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Small tensors gain nothing from a second thread, and waiting for one on a busy machine costs minutes.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=None, help="repeat a run with the seed that it printed")


def pytest_ignore_collect(collection_path, config):
    """tests/frameworks need packages of their own, so they are run only where they are named: make test-frameworks."""
    named = any("tests/frameworks" in str(arg) for arg in config.invocation_params.args)
    return True if collection_path.name == "frameworks" and not named else None


def pytest_configure(config):
    seed = config.getoption("--seed")
    if hasattr(config, "workerinput"):  # one of several processes that share the tests
        seed = config.workerinput["fsam_seed"]
    config.fsam_seed = int.from_bytes(os.urandom(3), "big") if seed is None else seed


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["fsam_seed"] = node.config.fsam_seed


def pytest_report_header(config):
    return f"fsam_ext: random inputs from --seed {config.fsam_seed}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.getoption("dist") == "loadgroup":
        from .sharing import scheduler

        return scheduler(config, log)


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        from .sharing import place

        items.sort(key=lambda item: place(item.nodeid))


@pytest.fixture(autouse=True)
def _seeded(request):
    torch.manual_seed(request.config.fsam_seed)
    yield
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)  # for the tests that follow
        pytest.fail("it leaves gradients switched off")


@pytest.fixture
def three_threads():
    """Among which looks and ops share more than 256 tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
