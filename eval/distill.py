"""Measured loss floors: students narrower than the model, trained from it, and what is left between them on held-out tokens.

`python -m eval distill` trains students (eval/students.py) of several widths and seeds on the cache's training tokens, measures
each on its held-out tokens, and holds the floors beside those that eval/floor.py predicts from every SAE that `python -m eval`
has measured. All of it is in one file, <runs>/distilled.json: a list of experiments, the one asked for last first. An
experiment is everything that was distilled under one setting; widths and seeds are added to it and never taken away. Keys:

    digest, cache     of what the students depend on (model, tokens and `setting`), and of the cache
    model             its name
    setting           temperature, tokens, batch, lr, …: eval.students.DistillConfig and the held-out tokens measured on
    teacher           {"width", "ce"}: nats a token on the held-out tokens
    students          one a width and seed, in that order: {"width", "seed", "heads", "parameters", "steps", "floor", "kl",
                      "ce", "device"}
                          floor   mean KL(teacher ‖ student) a token in nats, both at `temperature`: what was minimised, without
                                  the factor temperature² that some write before it
                          kl      the same at temperature 1, as `kl_div_with_sae` is
                          ce      the student's cross-entropy on the next token
    floors            one a width: {"width", "seeds", "floor", "spread", "kl", "ce"}: means over seeds, and the standard
                      deviation of the seeds' floors (n − 1; null of one seed)
    predictions       one an SAE, latest snapshot of each run and layer: {"run", "run_digest", "layer", "snapshot", "file",
                      "tokens", "alive_above", "F", "alpha", "capacity", "critical_width",
                      "widths": {"<width>": {"predicted", "naive"}},   L* of that student, and the same without superposition: a
                                                                       feature a dimension, g = 1
                      "fits": {"predicted", "naive", "log_width"}}     eval.fit.Fit of the measured floors over L*, the naive
                                                                       floor, and −ln(width), which knows nothing of
                                                                       features: L* is worth what it does better
    crc32c            of this experiment; see shared/seal.py

A fit (null where there are fewer than three widths, or the prediction is the same for all):

    {"C", "B"         floor ≈ C · x + B, least squares over the widths' mean floors
     "C_se", "B_se"   their standard errors from the residuals, with n − 2 degrees of freedom
     "r2"             1 − Σ residual² / Σ (floor − mean)²
     "r2_low", "r2_high"   2.5 and 97.5 % of r2 when each width's seeds are drawn again with replacement: what seeds leave
                      open, not whether the line is right
     "left_out_r2"    1 − Σ (floor − left_out)² / Σ (floor − mean)²: below 0 the mean of the floors is the better prediction
     "points": [{"width", "x", "floor", "spread", "fitted", "left_out"}]   left_out: from the fit of all other widths
     "near_critical": {"width", "ratio", "error", "left_out_error"} | null}   of the width nearest to d*: width / d*, and
                      (fitted − floor) / floor of the fit and of the fit without it
"""
