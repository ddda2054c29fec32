"""Seeded faults in the linear layers of a decode step, and which tests have to catch each."""

from .faults import Fault

KERNEL = "hf_fastattn/kernels/decode_linear.py"
PLAN = "hf_fastattn/kernels/decode_linear_plan.py"
OP = "hf_fastattn/ops/decode_linear.py"
LINEAR = "hf_fastattn/linear.py"
IN_INTERPRETER = ("tests/interpret/test_decode_linear.py", "-k", "not any_sizes")
ODD = ("tests/interpret/test_decode_linear.py", "-k", "odd_sizes or several_weights or takes")
OPS = "tests/test_decode_linear.py"
OUT = "tests/test_linear.py"
MODELS = "tests/transformers/test_linear.py"

LINEAR_FAULTS = [
    Fault(
        "columns past K count",
        KERNEL,
        "w_inside = None if EVEN_K else (k + offs_k < size_k)[None, :]",
        "w_inside = None if EVEN_K else (k + offs_k < size_k + 16)[None, :]",
        ODD,
    ),
    Fault(
        "weight rows past N are read",
        KERNEL,
        "w_rows = tl.minimum(cols, size_n - 1)",
        "w_rows = tl.minimum(cols, size_n + 999)",
        ("tests/interpret/test_decode_linear.py::test_nothing_is_read_outside_of_the_tensors",),
    ),
    Fault(
        "row offsets of 32 bits",
        KERNEL,
        "tl.minimum(cols, size_n - 1).to(tl.int64) * stride_w_row",
        "tl.minimum(cols, size_n - 1) * stride_w_row",
        ("tests/interpret/test_decode_linear.py::test_row_offsets_of_more_than_32_bits",),
    ),
    Fault(
        "bias added by no one when K is split",
        KERNEL,
        "_write(acc, row, col, part_col, num_rows, size_n, out_ptr, bias_ptr, None, part_width)",
        "_write(acc, row, col, part_col, num_rows, size_n, out_ptr, None, None, part_width)",
        ODD,
    ),
    Fault(
        "tiles of the third weight go to the second",
        KERNEL,
        "index += (tile >= tiles_0 + tiles_1).to(tl.int32)",
        "index += (tile > tiles_0 + tiles_1).to(tl.int32)",
        ODD,
    ),
    Fault(
        "splits leave out the last step",
        KERNEL,
        "(split + 1) * tiles // num_splits * BLOCK_K",
        "(split + 1) * (tiles - 1) // num_splits * BLOCK_K",
        ODD,
    ),
    Fault(
        "unaligned weights given to a kernel",
        KERNEL,
        "if weight.data_ptr() % 16 or weight.stride(0) % ROW_MULTIPLE or weight.shape[0] == 0:",
        "if weight.shape[0] == 0:",
        IN_INTERPRETER,
    ),
    Fault(
        "unknown GPUs take a known one's plans",
        PLAN,
        "table = TABLES.get(arch)",
        "table = TABLES.get(arch, TABLES[80])",
        (OPS, "-k", "library_takes"),
    ),
    Fault(
        "measured shapes used far away",
        PLAN,
        "_distance(nearest, n, k) > 1.0",
        "_distance(nearest, n, k) > 9.0",
        (OPS, "-k", "measured"),
    ),
    Fault(
        "gradients do not flow through the op",
        OP,
        "return F.linear(x, weight, bias)\n    return _OP",
        "return F.linear(x.detach(), weight, bias)\n    return _OP",
        (OPS, "-k", "gradients_flow"),
    ),
    Fault(
        "an input changed in place is not noticed",
        LINEAR,
        "held[0] is x and held[1] == version",
        "held[0] is x",
        (OUT, "-k", "changes_its_ways"),
    ),
    Fault(
        "an equal shape is taken for the same input",
        LINEAR,
        "held[0] is x and held[1] == version",
        "held[0].shape == x.shape and held[1] == version",
        (OUT, "-k", "changes_its_ways or used_again"),
    ),
    Fault(
        "outputs stay alive",
        LINEAR,
        "            if place == len(self.members) - 1:\n                self._held = None\n",
        "",
        (OUT, "-k", "kept_alive or run_together"),
    ),
    Fault(
        "an output is handed out twice",
        LINEAR,
        "output, held[2][place] = held[2][place], None",
        "output = held[2][place]",
        (OUT, "-k", "handed_out"),
    ),
    Fault(
        "training runs the op",
        LINEAR,
        "if self.training or not _kernel_may_run(input, weight, bias):",
        "if not _kernel_may_run(input, weight, bias):",
        (OUT, "-k", "training_gradients"),
    ),
    Fault(
        "autocast ignored",
        LINEAR,
        "weight.device != x.device or torch.is_autocast_enabled(x.device.type):",
        "weight.device != x.device:",
        (OUT, "-k", "training_gradients"),
    ),
    Fault(
        "pickles need this package",
        LINEAR,
        "return nn.Linear.__new__, (Twofold(DecodeLinear, nn.Linear),), Twofold(self.__dict__, state)",
        "return nn.Linear.__new__, (DecodeLinear,), self.__dict__",
        (OUT, "-k", "pickles"),
    ),
    Fault(
        "copies stay in the original's group",
        LINEAR,
        "twin = memo[id(self)] = Group(len(self.members))",
        "twin = memo[id(self)] = self",
        (OUT, "-k", "copies"),
    ),
    Fault(
        "hooked layers are taken",
        LINEAR,
        'if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:',
        "if False:",
        (OUT, "-k", "left_alone"),
    ),
    Fault(
        "layers inside LoRA are taken",
        LINEAR,
        'if hasattr(outer, "base_layer") for inner',
        "if False for inner",
        (MODELS, "-k", "lora_wrapped"),
    ),
    Fault(
        "projections never run together",
        LINEAR,
        "            self.together = True\n",
        "            self.together = None\n",
        (MODELS, "-k", "one_launch and llama"),
    ),
]
