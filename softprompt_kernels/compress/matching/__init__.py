"""A KV prompt fitted to the teacher's attention, layer by layer, without a pass through the model.

`parts` splits what the teacher's attention gave into the context's part and the rest, `closed_form` chooses keys and
solves for their masses and values, `refine` improves keys and values by Adam, `match` does this for all layers.
"""
