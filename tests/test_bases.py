"""Any class of optimizers as base: torch's own, the kinds that public ones are, and a sentence for those that cannot.

bench/bases.py tries the classes of public libraries in the same way.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from bench import bases
from bench.bases import Row, Trial, differ, sentence, table, trained, trials, try_out
from fsam_ext import SAM, FriendlySAM

from .conformance import identical

TORCHS = dict(trials(torch.optim))
FUSED = ("SGD", "Adam", "AdamW")
REFUSED = {
    "LBFGS": "LBFGS evaluates the loss inside its step, which the two passes of F-SAM rule out; choose one whose",
    "SparseAdam": "alone too: RuntimeError: SparseAdam does not support dense gradients",
}


@pytest.mark.parametrize("name", TORCHS)
def test_torchs_own(name):
    row = try_out(name, TORCHS[name])
    if name in REFUSED:
        assert REFUSED[name] in row.note and row.update == row.resume == "no"
    elif name in FUSED:  # their update is one pass with the restore, which rounds in another order
        assert row.resume == "yes" and row.update != "no"
        subclass = type(name, (TORCHS[name].cls,), {})
        assert try_out(name, Trial(subclass, TORCHS[name].options)).serves
    else:
        assert row.serves, row


class Base(Optimizer):
    """A small optimizer of a kind."""

    extra = {}

    def __init__(self, params, lr=0.05):
        super().__init__(params, {"lr": lr, **self.extra})
        self.prepare()

    def prepare(self):
        pass

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.direction(p, self.state[p], group), alpha=group["lr"])


class SecondMomentPerTensor(Base):
    """Amos, Nero, Adam-mini."""

    def direction(self, p, state, group):
        state["exp_avg_sq"] = 0.9 * state.get("exp_avg_sq", torch.zeros(())) + 0.1 * p.grad.pow(2).mean()
        return p.grad / state["exp_avg_sq"].sqrt()


class StateUnderAWord(Base):
    """MADGRAD."""

    def direction(self, p, state, group):
        self.state["k"] = self.state.get("k", torch.zeros(1)) + 1
        return p.grad / self.state["k"]


class StateOfTheConstructor(Base):
    """SPAM, SaRA."""

    def prepare(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["w0"] = p.detach().clone()

    def direction(self, p, state, group):
        return p.grad + p - state["w0"]


class DictAsMomentum(Base):
    """AggMo."""

    def direction(self, p, state, group):
        buffers = state.setdefault("momentum_buffer", {})
        buffers["0"] = 0.9 * buffers.get("0", torch.zeros_like(p)) + p.grad
        return buffers["0"]


class DtypeAmongOptions(Base):
    """PSGD Kron, ROSE."""

    extra = {"mu_dtype": torch.float64}

    def direction(self, p, state, group):
        dtype = group["mu_dtype"]
        state["mu"] = 0.9 * state.get("mu", torch.zeros_like(p, dtype=dtype)) + p.grad.to(dtype)
        return state["mu"].float()


class MoreInStateDict(Base):
    """StableSPAM, Ranger21."""

    n = 0

    def direction(self, p, state, group):
        self.n += 1
        return p.grad / self.n

    def state_dict(self):
        return {**super().state_dict(), "n": self.n}

    def load_state_dict(self, state_dict):
        self.n = state_dict["n"]
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "n"})


class ReadOnlyState(Base):
    """What wraps another optimizer has its state as a property."""

    @property
    def state(self):
        return self.within

    @state.setter
    def state(self, value):
        if "within" in self.__dict__:
            raise AttributeError("property 'state' has no setter")
        self.within = value

    def __setstate__(self, state):
        self.within.clear()
        self.within.update(state["state"])
        self.param_groups = state["param_groups"]

    def direction(self, p, state, group):
        state["sum"] = state.get("sum", torch.zeros_like(p)) + p.grad
        return state["sum"]


class GroupsWithKeysOfTheirOwn(Base):
    """KellerJordan's Muon."""

    def __init__(self, param_groups):
        for group in param_groups:
            if "use_muon" not in group:
                raise ValueError("give use_muon")
            group.setdefault("lr", 0.05)
        Optimizer.__init__(self, param_groups, {})

    def direction(self, p, state, group):
        return p.grad.sign() if group["use_muon"] else p.grad


class TrainAndEval(torch.optim.SGD):
    """Schedule-free optimizers: steps in train mode only."""

    mode = "eval"

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"

    def step(self, closure=None):
        if self.mode != "train":
            raise RuntimeError("not in train mode")
        super().step()


KINDS = [Trial(cls) for cls in Base.__subclasses__() if cls is not GroupsWithKeysOfTheirOwn]
KINDS += [Trial(GroupsWithKeysOfTheirOwn, groups=bases.split), Trial(TrainAndEval, {"lr": 0.05})]


@pytest.mark.parametrize("trial", KINDS, ids=lambda trial: trial.cls.__name__)
def test_kinds_of_public_optimizers_train_as_alone_and_resume(trial):
    row = try_out(trial.cls.__name__, trial)
    assert row.serves, row


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("cls", [FriendlySAM, SAM])
@pytest.mark.parametrize("key", ["momentum", "old_p", "first_grad", "e_w", "ema", "master", "ema_scale"])
def test_state_of_the_base_with_a_name_that_others_use_is_the_bases(key, cls, resumed):
    """adamp.SGDP, Sophia and FAdam keep `momentum`: it was taken for the official code's average."""

    def weights(key, resumed=False):
        class Momentum(Base):
            def direction(self, p, state, group):
                return state.setdefault(key, torch.zeros_like(p)).mul_(0.9).add_(p.grad)

        return trained(Trial(Momentum), 0.1, resumed, **({"sigma": 0.0} if cls is SAM else {}))

    assert differ(weights(key, resumed), weights("buf")) == 0


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("name", ["NAdam", "RAdam", "Adagrad", "RMSprop", "Adam", "AdamW", "Adamax", "ASGD"])
def test_steps_that_a_checkpoint_has_as_numbers(name, amsgrad):
    """Old releases of torch wrote them; torch's optimizers make tensors of them when they load."""
    cls, options = getattr(torch.optim, name), {"amsgrad": True} if amsgrad else {}
    if amsgrad and name not in ("Adam", "AdamW"):
        options = {"maximize": True}
    weights = torch.linspace(-1, 1, 12).reshape(4, 3)

    def step(optimizer, p):
        for half in (optimizer.first_step, optimizer.second_step) if isinstance(optimizer, SAM) else (optimizer.step,):
            p.grad = 0.1 * torch.ones_like(p)
            half()
        return p.detach().clone()

    p = nn.Parameter(weights.clone())
    optimizer = cls([p], **options)
    step(optimizer, p)
    state_dict = optimizer.state_dict()
    for entry in state_dict["state"].values():
        numbers = ("step", "mu_product", "eta", "mu")
        entry.update({k: v.item() for k, v in entry.items() if k in numbers and isinstance(v, torch.Tensor)})
    results = []
    for make in (lambda p: cls([p], **options), lambda p: SAM([p], cls, rho=0.0, **options)):
        p = nn.Parameter(weights.clone())
        other = make(p)
        other.load_state_dict(copy.deepcopy(state_dict))
        results.append(step(other, p))
    torch.testing.assert_close(*results, rtol=0, atol=2**-22)  # pass C's roundings of numbers up to 1


GENERIC = ["Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD", "Adagrad", "Adam amsgrad", "AdamW amsgrad", "SGD"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: torch.load(io.BytesIO(saved(o)), weights_only=False)])
@pytest.mark.parametrize("base", GENERIC)
def test_copies_where_a_parameter_has_an_average_and_no_state_of_the_base(base, copied):
    name, _, amsgrad = base.partition(" ")
    params = [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    optimizer = FriendlySAM(params, getattr(torch.optim, name), lr=0.1, **({"amsgrad": True} if amsgrad else {}))
    for p in params:
        p.grad = torch.ones(3, 2)
    optimizer.first_step()
    params[1].grad = None  # not used in the second pass
    optimizer.second_step()
    twin = copied(optimizer)
    others = twin.param_groups[0]["params"]
    for optimizer_, params_ in ((optimizer, params), (twin, others)):
        for half in (optimizer_.first_step, optimizer_.second_step):
            for p in params_:
                p.grad = p.detach() * 0.5
            half()
    assert all(identical(p, q) for p, q in zip(params, others, strict=True))


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


def test_the_bases_option_of_a_name_of_ours():
    """Adadelta's rho."""
    row = try_out("Adadelta", Trial(torch.optim.Adadelta, {"base_rho": 0.7}))
    assert "rho" in row.note and not row.serves  # alone it knows no base_rho
    inside = trained(Trial(torch.optim.Adadelta, {"base_rho": 0.7}), 0.0)
    assert differ(inside, trained(Trial(torch.optim.Adadelta, {"rho": 0.7}), None)) == 0


def test_lazy_parameters():
    model, bias = nn.LazyLinear(2), None
    optimizer = SAM(model.parameters(), lr=0.1)
    for half in (optimizer.first_step, optimizer.second_step):
        loss = model(torch.ones(1, 3)).sum()
        bias = model.bias.detach().clone() if half == optimizer.first_step else bias
        loss.backward()
        half()
        optimizer.zero_grad()
    torch.testing.assert_close(model.bias.detach(), bias - 0.1)
    assert model.weight.shape == (2, 3)


class TakesAModel(Base):
    def __init__(self, params, model, lr=0.05):
        super().__init__(params, lr)
        self.model = model

    def direction(self, p, state, group):
        return p.grad


def test_a_model_that_is_given_as_an_option():
    model = nn.Linear(2, 2)
    optimizer = SAM(model.parameters(), TakesAModel, model=model)
    assert optimizer.param_groups[0]["lr"] == 0.05
    with pytest.raises(TypeError, match="TakesAModel is made from a model"):
        SAM(model.parameters(), TakesAModel)


class Around(Base):
    """A wrapper."""

    def __init__(self, optimizer, k=5):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups


class OfAModel(Base):
    def __init__(self, model, lr=0.1):
        super().__init__(model.parameters(), lr)


class NeedsAnOption(Base):
    def __init__(self, params, num_data):
        super().__init__(params)


class SecondOrder(Base):
    """AdaHessian, Sophia."""

    def direction(self, p, state, group):
        with torch.enable_grad():
            return torch.autograd.grad(p.grad.square().sum(), p, retain_graph=True)[0]


class NeedsALoss(Base):
    def step(self, closure=None):
        if closure is None:
            raise ValueError("a closure, please")


@pytest.mark.parametrize(
    "trial, words",
    [
        (Trial(Around), "base_optimizer Around is a wrapper around another optimizer, which has the groups and the"),
        (Trial(OfAModel), "base_optimizer OfAModel is made from a model; choose one that is made from parameters"),
        (Trial(NeedsAnOption), "missing 1 required positional argument: 'num_data'"),
        (Trial(SecondOrder, create_graph=True), "SecondOrder differentiates the gradients in its step"),
        (Trial(NeedsALoss), "alone too: ValueError: a closure, please"),
    ],
    ids=lambda value: value.cls.__name__ if isinstance(value, Trial) else "",
)
def test_what_cannot_serve_says_so_in_a_sentence(trial, words):
    row = try_out(trial.cls.__name__, trial)
    assert words in row.note and (row.update, row.resume) == ("no", "no")
    assert f"| `{trial.cls.__name__}` | no | no |" in table([row])


def test_after_gradients_that_cannot_be_differentiated_the_weights_are_restored():
    p = nn.Parameter(torch.ones(3))
    optimizer = SAM([p], SecondOrder, rho=0.5)
    for half in (optimizer.first_step, optimizer.second_step):
        optimizer.zero_grad()
        p.pow(3).sum().backward(create_graph=True)
        if half == optimizer.second_step:
            with pytest.raises(RuntimeError, match="differentiates the gradients"):
                half()
        else:
            half()
    optimizer.restore()
    assert identical(p, torch.ones(3))


class Fickle(Base):
    """Neither trains twice alike nor resumes."""

    count = 0

    def direction(self, p, state, group):
        Fickle.count += 1
        return p.grad * (1 + Fickle.count / 100)


class Still(Base):
    def direction(self, p, state, group):
        return torch.zeros_like(p)


def test_the_table_tells_what_differs():
    row = try_out("Fickle", Trial(Fickle))
    assert row.update.startswith("off by") and row.resume == "no" and "two runs of it alone differ by" in row.note
    row = try_out("Still", Trial(Still))
    assert not row.serves and "does not train" in row.note
    assert sentence(ValueError("two\n  lines")) == "ValueError: two lines"
    assert "a \\| b" in table([Row("X", "no", "no", "a | b")])
