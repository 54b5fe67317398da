"""Config: round trip with the chosen union members, and errors that say what to type."""

import dataclasses
import typing

import pytest

from faceembed import config
from faceembed.config import CHOICES, Experiment, from_json, to_json


@pytest.mark.parametrize("field", CHOICES)
def test_every_union_member_reads_back_as_itself(field):
    for member in CHOICES[field].values():
        experiment = dataclasses.replace(Experiment(), **{field: member})
        again = from_json(to_json(experiment))
        assert again == experiment
        assert type(getattr(again, field)) is type(member)


def test_members_with_equal_fields_are_told_apart():
    # Triplet(margin=1) and Contrastive(margin=1) differ in nothing but their type.
    stored = to_json(dataclasses.replace(Experiment(), loss=config.Contrastive(margin=0.5)))
    assert isinstance(from_json(stored).loss, config.Contrastive)


def test_changed_values_survive():
    changed = Experiment(
        seed=7, encoder=config.ConvNet(widths=(4, 8), blocks=(1, 1)), batch=config.Batch(people=5, singletons=0.0),
        loss=config.Triplet(margin=0.35, miner="all"), data=config.Data(source="folder:/x y", data_dir="/d"),
    )  # fmt: skip
    assert from_json(to_json(changed)) == changed
    assert from_json(to_json(changed)).encoder.widths == (4, 8)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"seed": 0', '"sead": 0', "no field 'sead'.*'seed'"),
        ('"seed": 0', '"seed": "0"', "Experiment.seed is '0'"),
        ('"seed": 0', '"seed": true', "Experiment.seed is True"),
        ('"type": "Triplet"', '"type": "Quadruplet"', "type 'Quadruplet'"),
        ('"miner": "semi_hard"', '"miner": "softest"', "Triplet.miner is 'softest'"),
        ('"photos": 4', '"photos": 1', "no anchor has a positive.*--batch.photos 4"),
        ('"margin": 0.2', '"margin": 0', "zero loss.*--loss.margin 0.2"),
    ],
)
def test_a_bad_stored_config_is_named(old, new, message):
    text = to_json(Experiment())
    assert old in text
    with pytest.raises(ValueError, match=message):
        from_json(text.replace(old, new))


def test_a_cut_off_config_is_named():
    with pytest.raises(ValueError, match="not JSON"):
        from_json(to_json(Experiment())[:-10])


def test_names_agree_with_the_registries():
    from faceembed.encoders import ENCODERS
    from faceembed.margin_softmax import MARGINS
    from faceembed.mining import MINERS

    miner = typing.get_type_hints(config.Triplet)["miner"]
    assert set(typing.get_args(miner)) == set(MINERS)
    assert set(CHOICES["encoder"]) == set(ENCODERS)
    assert {"cosface", "arcface"} == set(MARGINS) <= set(CHOICES["loss"])
    from faceembed.data.sources import SOURCES

    assert {*config.SOURCES, *config.FORMS} == set(SOURCES)
    for name, member in CHOICES["encoder"].items():
        assert config.encoder_name(member) == name


@pytest.mark.parametrize(
    "encoder",
    [
        config.ConvNet(widths=(4, 8), blocks=(1, 2), dim=7),
        config.MobileFaceNet(dim=7),
        config.IResNet(depth=18, dropout=0.4, dim=7),
        config.InceptionResNetV1(dropout=0.2, dim=7),
        config.ViT(patch=4, width=24, depth=2, heads=3, drop_path=0.3, dim=7),
    ],
)
def test_an_encoder_is_built_with_every_value_of_its_config(encoder):
    from faceembed.embed import build_encoder

    module = build_encoder(Experiment(encoder=encoder, precision="bfloat16"))
    values = dataclasses.asdict(encoder)
    if isinstance(encoder, config.IResNet):
        del values["depth"]
        assert module.blocks == (2, 2, 2, 2)
    assert {name: getattr(module, name) for name in values} == values
    assert module.dtype == "bfloat16"


@pytest.mark.parametrize("name", CHOICES["encoder"])
def test_an_encoder_has_one_set_of_defaults(name):
    from faceembed.embed import build_encoder
    from faceembed.encoders import make_encoder

    assert build_encoder(Experiment(encoder=CHOICES["encoder"][name])) == make_encoder(name)


@pytest.mark.parametrize(
    ("build", "flag"),
    [
        (lambda: Experiment(steps=0), "--steps"),
        (lambda: Experiment(seed=-1), "--seed"),
        (lambda: config.Batch(people=1), "--batch.people"),
        (lambda: config.Schedule(learning_rate=0.0), "--schedule.learning-rate"),
        (lambda: config.Schedule(ema=1.0), "--schedule.ema"),
        (lambda: config.Augment(grey=1.5), "--augment.grey"),
        (lambda: config.Augment(rotation=-1.0), "--augment.rotation"),
        (lambda: config.Checkpoint(every=0), "--checkpoint.every"),
        (lambda: config.Data(margin=0.5), "--data.margin"),
        (lambda: config.Data(source="celebb"), "--data.source celeba"),
        (lambda: config.Data(source="folder:"), "--data.source folder:/photos"),
        (lambda: config.Data(source="insightfaces:/x"), "--data.source insightface:/ms1mv3/train.rec"),
        (lambda: config.Data(source="prepared"), "--data.source prepared:ms1mv3"),
        (lambda: config.Data(people=0), "--data.people"),
        (lambda: config.Data(memory_gb=float("nan")), "--data.memory-gb"),
        (lambda: config.Schedule(weight_decay=float("nan")), "--schedule.weight-decay"),
        (lambda: config.Schedule(weight_decay=-1.0), "--schedule.weight-decay"),
        (lambda: config.Schedule(clip_norm=float("nan")), "--schedule.clip-norm"),
        (lambda: config.Schedule(learning_rate=float("inf")), "--schedule.learning-rate"),
        (lambda: config.AdamW(b2=2.0), "--optimizer.b2 0.999"),
        (lambda: config.SGD(momentum=3.0), "--optimizer.momentum"),
        (lambda: config.Triplet(margin=float("inf")), "--loss.margin"),
        (lambda: config.CosFace(margin=1.0), "0 ≤ margin < 1. Try --loss.margin 0.35"),
        (lambda: config.CosFace(scale=0), "--loss.scale 64"),
        (lambda: config.ArcFace(margin=1.6), "an angle in radians"),
        (lambda: config.ArcFace(sample=0), "0 < sample ≤ 1. Try --loss.sample"),
        (lambda: config.ConvNet(dim=0), "--encoder.dim"),
        (lambda: config.IResNet(dim=-1), "--encoder.dim"),
        (lambda: config.IResNet(dropout=1.0), "--encoder.dropout"),
        (lambda: config.InceptionResNetV1(dropout=float("nan")), "--encoder.dropout"),
        (lambda: config.ViT(drop_path=-0.1), "--encoder.drop-path"),
        (lambda: config.ViT(patch=0), "--encoder.patch 8"),
        (lambda: config.ViT(width=100), "--encoder.width 96"),
        (lambda: config.ConvNet(widths=(4, 8)), "--encoder.blocks"),
    ],
)
def test_bad_values_say_what_to_type(build, flag):
    with pytest.raises(ValueError, match=flag):
        build()
