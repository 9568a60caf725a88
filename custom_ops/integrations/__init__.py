"""Our losses in the models of other libraries; a module needs the library it is named after."""
