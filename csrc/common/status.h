// How host code says no. The bindings turn each class into the Python class of the same name.
#pragma once

#include <stdexcept>
#include <string>

// An argument broke one of its rules; nothing was launched. Text: "argument: rule; got value".
class ArgumentError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// This machine cannot run the kernels, whatever the arguments: wrong architecture, no driver. The text says what to do.
class BackendError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};
