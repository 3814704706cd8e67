"""The recipes of the docs, as they are written there, against the two passes written by hand."""

from __future__ import annotations

import os
from argparse import Namespace
from functools import partial

import numpy
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.data import DataLoader

from fsam_ext import FriendlySAM

from ..pages import DOCS, blocks
from .reference import SIZE, RandomStates, batches, difference, loss_of, network, rows, train

OPTIONS = {"rho": 0.1, "lr": 0.1, "momentum": 0.9}


def recipe(title):
    """The names that the first example under a heading defines."""
    return next(block for block in blocks(DOCS / "frameworks-recipes.md") if block.heading == title).run()


def made(model):
    return FriendlySAM(model.parameters(), SGD, **OPTIONS)


def by_hand(states, **options):
    model = network(dropout=0.5, batch_norm=True)
    losses = train(model, made(model), batches(), states=states, **options)
    return model, losses


def test_skorch(record):
    pytest.importorskip("skorch")
    from skorch.callbacks import GradientNormClipping

    model = network(dropout=0.5, batch_norm=True)
    net = recipe("skorch")["TwoPassClassifier"](
        model,
        criterion=nn.CrossEntropyLoss,
        optimizer=FriendlySAM,
        **{f"optimizer__{name}": value for name, value in OPTIONS.items()},
        max_epochs=1,
        batch_size=SIZE,
        train_split=None,
        callbacks=[GradientNormClipping(0.1)],
        verbose=0,
    ).initialize()
    assert net.module_ is model
    states = RandomStates(model[0], lambda: net.optimizer_.is_perturbed)
    net.partial_fit(torch.cat([x for x, _ in batches()]), torch.cat([y for _, y in batches()]))
    reference, losses = by_hand(states, clip=0.1)
    assert [batch["train_loss"] for batch in net.history[0]["batches"]] == losses
    record("skorch", "dropout, BatchNorm, clip", difference(model, reference))


@pytest.mark.parametrize("accumulate", (1, 2))
def test_fastai(accumulate, record):
    pytest.importorskip("fastai")
    from fastai.callback.training import GradientAccumulation, GradientClip
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    model = network(dropout=0.5, batch_norm=True)
    data = DataLoader(rows(), batch_size=SIZE)
    learner = Learner(
        DataLoaders(data, data),
        model,
        loss_func=nn.CrossEntropyLoss(),
        opt_func=partial(OptimWrapper, opt=FriendlySAM, **OPTIONS),
        lr=OPTIONS["lr"],
        cbs=[recipe("fastai")["TwoPassCallback"](), GradientAccumulation(SIZE * accumulate), GradientClip(0.1)],
    )
    learner.create_opt()
    states = RandomStates(model[0], lambda: learner.opt.opt.is_perturbed)
    with learner.no_bar(), learner.no_logging():
        learner.fit(1)
    reference, losses = by_hand(states, clip=0.1, accumulate=accumulate)
    assert len(states) == len(losses) == 8
    record("fastai", f"dropout, BatchNorm, clip, accumulate {accumulate}", difference(model, reference))


def test_ignite(record):
    pytest.importorskip("ignite")
    from ignite.engine import Events

    model = network(dropout=0.5, batch_norm=True)
    optimizer = made(model)
    states = RandomStates(model[0], lambda: optimizer.is_perturbed)
    trainer = recipe("Ignite")["two_pass_trainer"](model, optimizer, cross_entropy)
    seen = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.output))
    trainer.run(batches(), max_epochs=1)
    reference, losses = by_hand(states)
    assert seen == losses
    record("pytorch-ignite", "dropout, BatchNorm", difference(model, reference))


def keras_model(keras, kind):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((10,))
    hidden = keras.layers.BatchNormalization()(keras.layers.Dense(16, activation="tanh")(inputs))
    model = kind(inputs, keras.layers.Dense(3)(keras.layers.Dropout(0.5)(hidden)))
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model


def test_keras(record):
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    assert keras.backend.backend() == "torch"
    ours, reference = keras_model(keras, recipe("Keras")["TwoPassModel"]), keras_model(keras, keras.Model)
    optimizer, plain = made(ours), made(reference)
    ours.torch_optimizer = optimizer
    states = RandomStates(ours, lambda: optimizer.is_perturbed)
    x, y = (torch.cat(parts).numpy() for parts in zip(*batches()))
    history = ours.fit(x, y, batch_size=SIZE, epochs=1, shuffle=False, verbose=0).history

    def loss(model, batch):
        return model.loss(batch[1], model(batch[0], training=True))

    losses = []
    assert len(states) == 1 + 8  # fit() begins with a pass that only finds out about shapes
    for batch, state in zip(batches(), states[1:]):
        plain.zero_grad()
        torch.set_rng_state(state)
        value = loss(reference, batch)
        value.backward()
        losses.append(value.item())
        kept = [variable.value.clone() for variable in reference.non_trainable_variables]
        plain.first_step(zero_grad=True)
        torch.set_rng_state(state)
        loss(reference, batch).backward()
        for variable, value in zip(reference.non_trainable_variables, kept):
            variable.assign(value)
        plain.second_step()
    assert history["loss"][0] == pytest.approx(numpy.mean(losses), rel=1e-6)
    distances = [(a.value - b.value).abs().max().item() for a, b in zip(ours.variables, reference.variables)]
    assert len(distances) > 8
    record("keras", "dropout, BatchNorm", max(distances))


@pytest.mark.parametrize("scaled", (False, True), ids=("", "GradScaler"))
def test_torchvisions_references(scaled, record):
    torchvision = pytest.importorskip("torchvision")
    two_passes = recipe("torchvision's references")["two_passes"]
    draw = torch.Generator().manual_seed(1)
    data = [(torch.randn(4, 3, 32, 32, generator=draw), torch.randint(5, (4,), generator=draw)) for _ in range(3)]
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def begun():
        torch.manual_seed(0)
        model = torchvision.models.mobilenet_v3_small(num_classes=5)
        return model, made(model), torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None

    (ours, optimizer, scaler), (reference, plain, other) = begun(), begun()
    states = RandomStates(ours, lambda: optimizer.is_perturbed)
    args, losses = Namespace(clip_grad_norm=1.0), []
    for image, target in data:
        output, loss = two_passes(image, target, ours, criterion, optimizer, args, scaler)
        assert output.shape == (4, 5)
        losses.append(loss.item())
    options = {"grad_scaler": other, "autocast": torch.bfloat16} if scaled else {}
    by_hand = lambda model, batch: criterion(model(batch[0]), batch[1])  # noqa: E731
    assert losses == train(reference, plain, data, states=states, clip=1.0, loss=by_hand, **options)
    record("torchvision", "mobilenet_v3_small" + (", GradScaler" if scaled else ""), difference(ours, reference))


def test_the_recipes_are_compared_with_something_else_than_the_base_optimizer():
    model, plain = network(), network()
    train(model, made(model), batches())
    optimizer = SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for batch in batches():
        optimizer.zero_grad()
        loss_of(plain, batch).backward()
        optimizer.step()
    assert difference(model, plain) > 1e-3
