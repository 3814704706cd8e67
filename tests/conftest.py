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


# NOTE [who runs what]
# Each of the processes that share the tests makes a fixture for itself. What takes long to make is made in one of them:
# the tests that ask for it are a group. So are those with ranks, which wait for each other by asking again and again.
# The groups and the tests that take longest come first, in this order, so that all processes end together.
FIRST = (
    "kernels",
    "ranks",
    "test_kernels_are_clean_under_sanitizers",
    "dry",
    "executed",
    "compiled",
    "all_programs",
    "test_sigint_then_resume_gives_the_bits_of_an_undisturbed_run",
    "test_same_bits_on_every_isa",
    "test_the_compiled_code_gives_the_bits_of_the_cpu_backend_and_issues_few_instructions",
    "test_whatever_the_conformance_suite_launches_passes_tritons_binder",
    "test_a_prepared_cache_is_found_where_it_is_unpacked",
    "tree",
    "planted",
)


def group(item: pytest.Item) -> int:
    """The place in FIRST of a fixture that a test asks for, of its folder's processes, or of the test itself."""
    names = {*item.fixturenames, item.originalname, "ranks" if "distributed" in item.path.parts else ""}
    return next((place for place, name in enumerate(FIRST) if name in names), len(FIRST))


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(config, items):
    if config.getoption("loadgroup", False):
        items.sort(key=group)
        for item in items:
            if group(item) < len(FIRST):
                item.add_marker(pytest.mark.xdist_group(FIRST[group(item)]))


@pytest.fixture(autouse=True)
def _seeded(request):
    torch.manual_seed(request.config.fsam_seed)
    yield
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)  # for the tests that follow
        pytest.fail("it leaves gradients switched off")
