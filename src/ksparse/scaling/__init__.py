"""Many runs -> one law.

solve    least squares on logs of sums of two powers: fits, intervals, bootstrap
forms    what each law may look like
points   CSV -> points
law      points -> one law: fit, compare, predict
"""
