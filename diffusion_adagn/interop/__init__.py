"""Networks of other libraries: ADM's checkpoints and diffusers' UNet2DModel in, our networks out."""
