"""Seeded faults in offloading, and which tests have to catch each."""

from .faults import Fault

OFFLOAD = "hf_fastattn/offload.py"
CACHE = "hf_fastattn/cache.py"
POOL = "hf_fastattn/kv_pool.py"
STATE = "hf_fastattn/paged_state.py"
TEST = "tests/test_offload.py::test_"
LOGITS = ("tests/test_offload.py", "-k", "logits or forks")

OFFLOAD_FAULTS = [
    Fault(
        "attention does not wait for the copy",
        OFFLOAD,
        "        staging.queue(self.place).join(slot.ready)\n",
        "",
        LOGITS,
    ),
    Fault(
        "the next layer is copied over the one that attends",
        OFFLOAD,
        "if slot is not keep), None)",
        "if True), None)",
        (f"{TEST}the_next_layer_is_copied_before_its_turn", f"{TEST}logits_of_prefill_chunks_and_decode"),
    ),
    Fault(
        "the next layer is not copied ahead",
        OFFLOAD,
        "following = self.following if step is not None else None",
        "following = None",
        (f"{TEST}the_next_layer_is_copied_before_its_turn",),
    ),
    Fault(
        "a copy serves the next forward pass too",
        OFFLOAD,
        "s.layer == blocks.index and s.step is step)",
        "s.layer == blocks.index)",
        (f"{TEST}a_forward_pass_that_failed_leaves_no_copy_behind",),
    ),
    Fault(
        "new tokens stay on the device",
        OFFLOAD,
        "self.staging.queue(self.place).copy(slot.caches, self.host, self.staging.runs(state, step)[1])",
        "pass",
        LOGITS,
    ),
    Fault(
        "only the first new block comes back",
        OFFLOAD,
        "row[begin // state.block_size : count(end)]",
        "row[begin // state.block_size : begin // state.block_size + 1]",
        LOGITS,
    ),
    Fault(
        "full blocks only are copied to the device",
        OFFLOAD,
        "row[: count(begin)] for row",
        "row[: begin // state.block_size] for row",
        LOGITS,
    ),
    Fault(
        "everything comes back",
        OFFLOAD,
        "row[begin // state.block_size : count(end)]",
        "row[: count(end)]",
        (f"{TEST}only_what_is_used_goes_in_and_only_what_is_new_comes_back",),
    ),
    Fault(
        "the host reads its blocks while copies are under way",
        OFFLOAD,
        "        self.staging.finish()\n        return self._host[side]",
        "        return self._host[side]",
        LOGITS,
    ),
    Fault(
        "copies outlive growth",
        OFFLOAD,
        "            self.staging.slots.clear()  # the blocks have other numbers or places from now on\n",
        "            pass\n",
        (f"{TEST}growth_drops_the_copies_and_makes_larger_ones",),
    ),
    Fault(
        "runs are copied block by block",
        OFFLOAD,
        "if runs and runs[-1][1] == block:",
        "if False:",
        (f"{TEST}runs_are_copied_whole",),
    ),
    Fault(
        "threads use the same slots",
        OFFLOAD,
        "return threading.current_thread().ident, blocks.kind",
        "return None, blocks.kind",
        (f"{TEST}threads_do_not_take_each_others_room",),
    ),
    Fault(
        "slots of threads that ended are kept",
        OFFLOAD,
        "if key[0] not in alive:",
        "if False:",
        (f"{TEST}threads_do_not_take_each_others_room",),
    ),
    Fault(
        "a full host is an error of the allocator",
        POOL,
        "            except MemoryError as error:\n",
        "            except ZeroDivisionError as error:\n",
        (f"{TEST}when_the_host_is_full_growth_says_so_and_leaves_the_cache_as_it_was",),
    ),
    Fault(
        "a larger limit is advised where the host is full",
        CACHE,
        'advice = "" if full.detail == MEMORY_FULL else',
        "advice =",
        (f"{TEST}when_the_host_is_full_growth_says_so_and_leaves_the_cache_as_it_was",),
    ),
    Fault(
        "a pickled cache is not offloaded any more",
        "hf_fastattn/saved_state.py",
        '"offload": state.memory.offload,',
        '"offload": False,',
        (f"{TEST}forks_crop_select_pickle_and_reset",),
    ),
    Fault(
        "an offloaded cache reserves and asks to be compiled",
        STATE,
        "self.memory.num_blocks is None and not self.memory.offload\n",
        "self.memory.num_blocks is None\n",
        (f"{TEST}a_compiled_model_stays_right",),
    ),
]
