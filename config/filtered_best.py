# GPT-2 124M on the windows that config/baseline_best.py has valued, as study/README.md recommends to filter.
#
#   python train.py config/filtered_best.py                          the control, in out/best_control
#   python train.py config/filtered_best.py --filter_negative=True   the treatment, in out/best_filtered
#   python train.py config/filtered_best.py --drop_random=0.4        the other control, in out/best_random
#   python report.py out/baseline_best out/best_control out/best_filtered out/best_random
#
# First ask python trial.py out/baseline_best. Then run both controls: on undamaged text the study's gain is below the
# noise of a single run, and trials do not see it. For --drop_random take the share that the coverage line calls
# negative. Run several seeds (--seed=1 and so on) to see your own noise.
# A run costs what a plain run costs: nothing is scored.

out_dir = "out/best_{arm}"
dataset = "openwebtext"
init_from = "scratch"

# Only windows that were valued, the paper's pool. The sign decides. In the study, the sign of averaged directions
# dropped 40% and saved as much as the oracle, where 15% of the windows were damaged.
filter_from = "out/baseline_best"
filter_pool = "scored"
filter_negative = False

n_layer = 12
n_head = 12
n_embd = 768
vocab_size = 50304
dropout = 0.0
bias = True

# 3,000 iterations of 480 draw 1,440,000 of 2,880,000 windows: none is seen twice even if half of them are dropped, so
# no arm repeats more windows than another
batch_size = 16
gradient_accumulation_steps = 30
block_size = 1024
max_iters = 3000
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 300
lr_decay_iters = 3000
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

score = False

eval_interval = 250
eval_iters = 4
checkpoint_interval = 250
log_interval = 10

device = "cuda"
dtype = "bfloat16"
compile = True
