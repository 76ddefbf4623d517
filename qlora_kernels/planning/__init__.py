"""Memory and time of a finetune before it is run: ``qlora plan``; ``qlora finetune`` asks too."""
