"""Seeded faults in paging by default and in the lease of pools, and which tests have to catch each."""

from .faults import Fault

AUTO = "hf_fastattn/auto.py"
GENERATION = "hf_fastattn/paged_generation.py"
LEASES = "hf_fastattn/leases.py"
CACHE = "hf_fastattn/cache.py"
LAYER = "hf_fastattn/paged_layer.py"
STATE = "hf_fastattn/paged_state.py"
TEST_AUTO = "tests/transformers/test_auto.py::test_"
TEST_LEASES = "tests/transformers/test_leases.py::test_"

AUTO_FAULTS = [
    Fault(
        "every config leads to the paged class",
        AUTO,
        "type(config) is native and config._attn_implementation == IMPLEMENTATION:",
        "type(config) is native:",
        (f"{TEST_AUTO}others_get_the_native_classes[llama]",),
    ),
    Fault(
        "a config that asked pages whatever it builds",
        AUTO,
        "return IMPLEMENTATION in (wanted.values() if isinstance(wanted, dict) else [wanted])",
        "return True",
        (f"{TEST_AUTO}others_get_the_native_classes[llama]",),
    ),
    Fault(
        "models built from a config keep the class that asked",
        AUTO,
        "            config = copy.deepcopy(config)",
        "            pass",
        (f"{TEST_AUTO}config_that_asks_for_fastattn_is_enough",),
    ),
    Fault(
        "remote code is passed over",
        AUTO,
        'names | {"_native": native})',
        'names | {"_native": native, "__module__": __name__})',
        (f"{TEST_AUTO}remote_code_and_other_registrations_win",),
    ),
    Fault(
        "somebody else's registration is replaced",
        AUTO,
        'if family in CONFIG_MAPPING and CONFIG_MAPPING[family].__module__.startswith("transformers."):',
        "if family in CONFIG_MAPPING:",
        (f"{TEST_AUTO}remote_code_and_other_registrations_win",),
    ),
    Fault(
        "a pickled model is paged",
        AUTO,
        "return _as_native(super().__reduce_ex__(1), type(self), Twofold(type(self), self._native))",
        "return super().__reduce_ex__(protocol)",
        (f"{TEST_AUTO}copies_and_pickles_name_native_classes", f"{TEST_AUTO}saved_models_load_without_the_package"),
    ),
    Fault(
        "a deepcopy of the model is not paged",
        AUTO,
        "Twofold(type(self), self._native)",
        "self._native",
        (f"{TEST_AUTO}deepcopy_stays_paged",),
    ),
    Fault(
        "a cache that is passed is replaced",
        GENERATION,
        "model_kwargs.get(CACHE_NAME) is not None or generation_config",
        "generation_config",
        (f"{TEST_LEASES}a_cache_that_is_passed_wins",),
    ),
    Fault(
        "cache_implementation is ignored",
        GENERATION,
        " or generation_config.cache_implementation is not None",
        "",
        (f"{TEST_LEASES}a_cache_implementation_wins",),
    ),
    Fault(
        "paged under every attention implementation",
        GENERATION,
        "return text_config(model.config)._attn_implementation == IMPLEMENTATION",
        "return bool(text_config(model.config))",
        (f"{TEST_LEASES}no_cache_and_other_attention_are_obeyed",),
    ),
    Fault(
        "the first pool has room for all that may come",
        STATE,
        "tokens = max(query_len, min(tokens, self.reserve))",
        "tokens = max(query_len, self.reserve)",
        (f"{TEST_LEASES}first_reservation_and_growth",),
    ),
    Fault(
        "an idle pool is leased twice",
        LEASES,
        "pool = _idle.pop(model, None)\n    if",
        "pool = _idle.get(model)\n    if",
        (f"{TEST_LEASES}two_threads_have_a_pool_each[llama]",),
    ),
    Fault(
        "a pool comes back while its cache is alive",
        LEASES,
        "    # The pool's end",
        "    _idle[model] = pool\n    # The pool's end",
        (f"{TEST_LEASES}returned_cache_is_not_overwritten", f"{TEST_LEASES}idle_pool_is_reused_and_released"),
    ),
    Fault(
        "pools do not come back",
        LEASES,
        "if model is None or not _num_bytes(pool):",
        "if True:",
        (f"{TEST_LEASES}idle_pool_is_reused_and_released",),
    ),
    Fault(
        "the smaller pool is kept",
        LEASES,
        "_num_bytes(other) < _num_bytes(pool)",
        "_num_bytes(other) > _num_bytes(pool)",
        (f"{TEST_LEASES}larger_call_gets_a_larger_pool_which_is_the_one_kept",),
    ),
    Fault(
        "layers keep their cache alive",
        LAYER,
        "self._cache = weakref.ref(cache)  # no cycle",
        "self._cache = lambda: cache  # no cycle",
        (f"{TEST_LEASES}idle_pool_is_reused_and_released",),
    ),
    Fault(
        "a handle does not keep its cache",
        LAYER,
        "NewStates(self, key_states, value_states, cache)",
        "NewStates(self, key_states, value_states)",
        ("tests/test_cache_modes.py::test_touching_a_handle_warns_once",),
    ),
    Fault(
        "PEFT gets no answer to how long a cache may become",
        CACHE,
        "        return self.paged_layers[0].get_max_length()",
        "        raise AttributeError",
        ("tests/test_cache_operations.py::test_peft_is_told_how_long_a_cache_may_become",),
    ),
    Fault(
        "pieces of a prompt are compiled",
        GENERATION,
        'valid = valid and not hasattr(generation_config, "_prefills")',
        "pass",
        ("tests/transformers/test_compile_policy.py", "-k", "pieces and 4-transformers"),
    ),
    Fault(
        "our own prefill is taken for a model's",
        "hf_fastattn/generate.py",
        'if kind.__module__.partition(".")[0] != __package__',
        "if True",
        ("tests/transformers/test_generate.py::test_ids_alone",),
    ),
    Fault(
        "rows of a prompt share keys behind dropout",
        GENERATION,
        "(states_differ or not treats_rows_alike(model))",
        "states_differ",
        (f"{TEST_AUTO}rows_of_a_prompt_share_nothing_behind_dropout",),
    ),
    Fault(
        "a config may promise more layers than there are",
        GENERATION,
        "len(layers) < promised:",
        "False:",
        ("tests/transformers/test_other_models.py", "-k", "promises_more"),
    ),
]
