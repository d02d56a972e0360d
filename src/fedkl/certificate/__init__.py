"""What an observation gives away whatever the attack: input directions, and bits under a prior."""

from fedkl.certificate.cancellation import Cancellation, cancellation
from fedkl.certificate.certify import TOLERANCE, Certificate, TooLargeError, certify
from fedkl.certificate.prior import Prior, deviations, prior_of

__all__ = [
    "TOLERANCE",
    "Cancellation",
    "Certificate",
    "Prior",
    "TooLargeError",
    "cancellation",
    "certify",
    "deviations",
    "prior_of",
]
