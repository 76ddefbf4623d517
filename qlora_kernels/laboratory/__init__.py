"""Number formats compared, on the kernels that train and serve them: ``qlora formats``.

``contenders`` says what is compared, ``weights``, ``outputs`` and ``language`` measure what it
loses, ``recover`` and ``where`` what a finetune wins back, ``report`` and ``plots`` show it.
"""
