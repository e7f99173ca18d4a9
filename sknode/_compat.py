"""What differs between the versions of scikit-learn that are supported."""

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # scikit-learn < 1.9 has no callbacks

    class _NoCallbacks:
        """The part of scikit-learn's callback context that fit calls."""

        def subcontext(self, **kwargs):
            return self

        def call_on_fit_task_begin(self, **kwargs):
            return self

        def call_on_fit_task_end(self, **kwargs):
            return False

    class CallbackSupportMixin:
        """Stand-in without callbacks."""

        def _init_callback_context(self, **kwargs):
            return _NoCallbacks()


__all__ = ["CallbackSupportMixin"]
