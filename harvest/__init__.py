from residual_saes._call import callable_package

callable_package(__name__)
