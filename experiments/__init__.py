"""One experiment or one question a file; `EXPERIMENTS` names those that `launch.py train` knows."""

from experiments import celeba, quickstart

EXPERIMENTS = {"quickstart": quickstart.EXPERIMENT, "celeba": celeba.EXPERIMENT}
