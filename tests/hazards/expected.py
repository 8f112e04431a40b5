"""Hazards that are not met yet: the one list to shorten when a kind is.

A hazard that is met and still here passes as ``XPASS``. Those of one kind may fail under some contexts only.
"""

from __future__ import annotations

KINDS = {
    "A": "host reads behind composite operators",
    "B": "raises where eager does not",
    "C": "reads or effects that are not seen",
    "D": "values of objects that are not compared at every call",
    "E": "not replayed without need",
    "F": "removed host values that were not proved",
}
NAMES = """
A/any_and_all A/branch A/branch_after_linear A/conditional_expression A/experts A/loop_while A/several_branches
A/transformer_encoder_layer A/transformer_encoder_with_padding A/truth_by_operator
B/activation_of_a_lazy_mapping B/causal_bias B/compiled_around_captured B/conditioned B/dict_kept_by_the_caller
B/dict_of_one B/distributed_weight B/flexible_attention B/list_in_list B/list_kept_by_the_caller
B/list_of_objects_that_raise B/list_of_one B/list_with_none B/list_with_number B/mapping_of_the_users B/mkldnn_module
B/nested_between B/object_that_raises B/object_that_raises_as_argument B/optimiser_step B/output_object_as_argument
B/scanned B/scripted_module B/sparse_between B/sparse_coo_buffer B/sparse_csr_buffer B/sparse_output B/tuple_in_list
B/tuple_of_one B/weight_of_two_tensors
C/array_of_numbers C/attribute_decides C/attribute_enters C/boundaries_on_the_host C/bytes_of_a_buffer C/conjugated
C/context_variable C/contiguity_decides C/default_of_a_function C/dict_keys_that_are_equal C/dict_of_a_module
C/environment C/environment_by_getenv C/file_that_is_read C/flags_without_names C/float_with_a_short_text
C/function_of_a_module C/grad_mode_changes C/grad_mode_decides C/hook_on_every_module
C/identity_of_an_argument_and_state C/identity_of_arguments C/keyword_default C/lengths_on_the_host C/method_of_a_class
C/module_attribute C/number_of_sections_on_the_host C/numpy_array C/object_of_a_module C/offset_enters
C/output_of_another_thread C/partial C/seeded_without_draw C/state_set C/static_method_of_a_class C/storage_size_enters
C/stride_enters C/text_with_a_fixed_text C/thread_count C/type_decides C/view_decides C/view_of_a_buffer
D/add_adapter D/cache_reset D/dict_entry D/entry_of_an_inner_dict D/epsilon_of_a_library_module D/forward_of_the_model
D/list_append D/list_entry D/list_in_a_tuple D/llama_act_fn D/llama_hook_of_a_layer D/llama_scaling
D/llama_variance_epsilon D/method_of_a_submodule D/module_list_append D/module_list_entry D/numpy_array D/numpy_number
D/parameter_gone D/scale_layer D/set_adapter D/simple_namespace D/submodule
E/argument_written E/attention_of_one_argument E/buffer_registered_again E/data_assigned E/dataclass_output
E/decoder_layer E/expanded E/lstm E/model_in_another_dtype E/nested_dataclass_output E/own_cache_returned
E/parameter_assigned E/part_of_an_argument_written E/sliced_into_linear E/state_assigned E/strided_argument_written
E/transposed_reshaped
F/columns_appended F/drawn_or_zero F/edges_between_kept F/factorised_or_not F/indexed_twice F/inverted_or_not
F/largest_plus_one F/mask_by_groups F/one_hot_of_largest F/one_hot_or_not F/repeats_in_one_line F/repeats_the_other_way
F/rows_by_index_by_mask F/sampled_or_best
"""
FAILING = {name: f"{KINDS[name[0]]}: {name}" for name in NAMES.split()}
"""Why each is expected to fail, by name."""
