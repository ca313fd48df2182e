# The demo's second run, on the windows that config/demo_baseline.py has valued; its other settings are the same.
#
#   python train.py config/demo_filtered.py                           the control, in out/demo_control
#   python train.py config/demo_filtered.py --filter_negative=True    the treatment, in out/demo_filtered

out_dir = "out/demo_{arm}"
dataset = "python"

filter_from = "out/demo_baseline"
filter_pool = "scored"
filter_negative = False

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0
bias = False

batch_size = 32
gradient_accumulation_steps = 1
block_size = 128
max_iters = 320

learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 40
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

score = False

eval_interval = 20
eval_iters = 16
checkpoint_interval = 100
log_interval = 20

device = "cpu"
dtype = "float32"
compile = False
