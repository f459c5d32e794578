"""What a recipe costs, before anything runs; and the rules that planning and training share.

plan       a recipe's costs here or on other devices, as text and JSON
costs      memory, communication and time of a training step, from sizes alone
evaluation memory and time of evaluations
flops      FLOPs of training
hardware   the devices that can be planned for
steps      which training step a device takes
sharing    what SAEs must have in common to train on one stream
"""
