"""Train a student on the ranks that a launcher started.

accelerate launch --config_file launch/accelerate/cpu.yaml --num_processes 2 launch/train.py RECIPE [key=value ...]
torchrun --nproc_per_node 4 launch/train.py RECIPE
python launch/train.py RECIPE
"""

import sys

from dfkd_dist.engine.entry import command, main

if __name__ == "__main__":
    sys.exit(command(main))
