# A small byte-level GPT on the embedded corpus, every window valued: minutes on two CPU cores.
#
#   python prepare_owt.py --source=python && python train.py config/demo_baseline.py

out_dir = "out/demo_baseline"
dataset = "python"

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0
bias = False

# 32 windows of 128 bytes: 4,096 tokens an iteration; 400 iterations value 12,800 windows
batch_size = 32
gradient_accumulation_steps = 1
block_size = 128
max_iters = 400

learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 40
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

# Sixteen validation windows, drawn anew every iteration, and AdamW's scaling of the direction. The windows cost 16/32
# of a step at this small batch. A batch of nanoGPT's size would pay 3%.
score = True
val_batch_size = 16
value_direction = "adam"

eval_interval = 20
eval_iters = 16
checkpoint_interval = 100
log_interval = 20

device = "cpu"
dtype = "float32"
compile = False
