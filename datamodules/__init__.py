"""`lightning_diffusion.datamodules`."""

if __name__ != "lightning_diffusion.datamodules":
    raise ImportError(
        "This folder is installed as lightning_diffusion.datamodules: write `import lightning_diffusion.datamodules`. In an "
        "uninstalled checkout the link lightning_diffusion/datamodules must be a symbolic link, not a text file."
    )
