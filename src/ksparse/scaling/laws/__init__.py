"""Scaling laws: points in, coefficients with intervals and predictions out.

law          `fit`: points to one law
survey       `fit_sweep`: every law that a sweep's folder has points for
forms        the laws, and the forms that each may have
candidates   fitting and comparing the forms of one law
solver       least squares on logs of sums of two powers, and the bootstrap
points       CSV files to points; merging of seeds
published    the numbers of Gao et al. 2024, for comparison
"""
