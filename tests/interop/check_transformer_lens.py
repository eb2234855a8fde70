"""
Check on a random GPT-2 what this library assumes of the hooks of TransformerLens.

Run in the environment of `write_fixtures.py`, to which sae-lens brings transformer-lens (checked with 3.9.0):

    .venv-peers/bin/python tests/interop/check_transformer_lens.py
"""

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import GPT2Config, GPT2LMHeadModel


torch.set_grad_enabled(False)
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=64)).eval()
for parameter in model.parameters():
    parameter.add_(0.3 * torch.randn_like(parameter))
tokens = torch.arange(1, 13)[None]
seen = {}
block = model.transformer.h[1]
block.ln_2.register_forward_hook(lambda module, inputs, output: seen.update(resid_mid=inputs[0], mlp_in=output))
block.register_forward_hook(
    lambda module, inputs, output: seen.update(resid_post=output[0] if isinstance(output, tuple) else output)
)
model(tokens)

centred = seen["resid_mid"] - seen["resid_mid"].mean(-1, keepdim=True)
normalized = centred / (centred.square().mean(-1, keepdim=True) + block.ln_2.eps).sqrt()
for folded in (True, False):
    config = HookedTransformerConfig(
        n_layers=2, d_model=32, n_ctx=32, d_head=8, n_heads=4, d_mlp=128, d_vocab=64, act_fn="gelu_new",
        normalization_type="LN", eps=block.ln_2.eps, device="cpu", original_architecture="GPT2LMHeadModel",
    )  # fmt: skip
    hooked = HookedTransformer(config)
    hooked.load_and_process_state_dict(
        convert_gpt2_weights(model, config),
        fold_ln=folded,
        center_writing_weights=folded,
        center_unembed=folded,
        fold_value_biases=folded,
    )
    _, cache = hooked.run_with_cache(tokens)
    stream = seen["resid_post"]
    expected = stream - stream.mean(-1, keepdim=True) if folded else stream
    # Folded or not, the hook of a norm comes before its gain and bias.
    torch.testing.assert_close(cache["blocks.1.ln2.hook_normalized"], normalized, atol=1e-5, rtol=1e-5)
    # Centered weights take the mean out of the stream.
    torch.testing.assert_close(cache["blocks.1.hook_resid_post"], expected, atol=1e-4, rtol=1e-5)
    assert (normalized - seen["mlp_in"]).abs().max() > 0.1
print("As assumed.")
