"""Before any import: no test asks the network for weights, and none waits for its time-outs."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
