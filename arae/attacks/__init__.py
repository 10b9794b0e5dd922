"""Attacks on classifiers of images in [0, 1]."""

from arae.attacks.apgd import apgd
from arae.attacks.dispatch import attack
from arae.attacks.gradient import fgsm, perturb, pgd
from arae.attacks.sanity import checks
from arae.attacks.suite import Outcome, autoattack
from arae.attacks.threat import Threat
from arae.modes import evaluating

__all__ = ["Outcome", "Threat", "apgd", "attack", "autoattack", "checks", "evaluating", "fgsm", "perturb", "pgd"]
