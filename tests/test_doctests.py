"""The examples in docstrings say what is so."""

import doctest
import importlib
import pkgutil

import pytest

import faceembed

MODULES = [
    module.name
    for module in pkgutil.walk_packages(faceembed.__path__, "faceembed.")
    if not module.ispkg and ">>>" in (importlib.util.find_spec(module.name).loader.get_source(module.name) or "")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted
    assert not found.failed
