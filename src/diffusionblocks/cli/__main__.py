from diffusionblocks.cli import program

program()
