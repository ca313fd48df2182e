# GPT-2 124M on OpenWebText, every training window valued, with the settings of "Data Shapley in One Training Run"
# (arXiv 2406.11011, App. E.1 and Sec. 5.3.1), to repeat its Figure 2 as published.
#
#   python prepare_owt.py && python train.py config/baseline.py
#
# The paper's loss of 3.75 is a loss on the Pile. OpenWebText is another text, so expect another number.
# For the Pile: python prepare_owt.py --source=<a copy on the hub> --domain_field=meta.pile_set_name --name=pile, then
# --dataset=pile.

out_dir = "out/baseline"
dataset = "openwebtext"
init_from = "scratch"

# 12 layers of 768: 124M parameters with GPT-2's vocabulary rounded up to a multiple of 64
n_layer = 12
n_head = 12
n_embd = 768
vocab_size = 50304
dropout = 0.0
bias = True

# the paper's batch: 16 windows of 1,024 tokens = 16,384 tokens an iteration, 327,680,000 in 20,000 iterations.
batch_size = 16
gradient_accumulation_steps = 1
block_size = 1024
max_iters = 20000

# the paper's AdamW and schedule
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
lr_decay_iters = 20000  # the schedule stays when --max_iters is less, for a first look
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

# The values. m = 1 validation window costs 1/16 of a step here, as in the paper's setting. But the direction of one
# window is mostly noise, so that a large share of the signs is wrong. The validation pass is paid once an iteration,
# whatever the number of micro-batches. A large batch makes a large m cheap, and then a fast GPU need not wait
# for Python (docs/cost.md). We recommend
#   --val_batch_size=16 --value_direction=adam --gradient_accumulation_steps=30
# This is nanoGPT's batch of 480 windows, with a validation pass of 16 / 480 = 3.3% of an iteration. 'adam' scales the
# direction as the optimiser scales its steps. 'sgd' is the paper's: derived for SGD, a proxy for Adam (Remark 7).
score = True
val_batch_size = 1
value_direction = "sgd"

eval_interval = 250
eval_iters = 20
checkpoint_interval = 1000
log_interval = 10

device = "cuda"
dtype = "bfloat16"
compile = True
