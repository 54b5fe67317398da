"""One experiment or one question a file; `EXPERIMENTS` names those that `launch.py train` knows."""

from experiments import celeba, celeba_lfw, finetune_dlib, quickstart

EXPERIMENTS = {
    "quickstart": quickstart.EXPERIMENT,
    "celeba": celeba.EXPERIMENT,
    "celeba_lfw": celeba_lfw.EXPERIMENT,
    "finetune_dlib": finetune_dlib.EXPERIMENT,
}
