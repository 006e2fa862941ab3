"""What was trained, for people without DeepSpeed: whole folders, plain LoRA, and the authors' checkpoints read in."""

from cuma_ds.inference.modeling import CumaForCausalLM, load_exported

__all__ = ["CumaForCausalLM", "load_exported"]
