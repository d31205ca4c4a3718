// The formats of 8 and 16 bits, and the number that a code stands for. FP8's are the OCP's: E4M3 has no infinity.
const FLOATS = { // bits of exponent and significand; how large exponents of ones alone are read
  fp16: { exponent: 5, significand: 10, ends: "ieee" },
  bf16: { exponent: 8, significand: 7, ends: "ieee" },
  e4m3: { exponent: 4, significand: 3, ends: "nan" }, // only all ones is no number
  e5m2: { exponent: 5, significand: 2, ends: "ieee" },
};
const INTEGERS = ["int8", "zeropoint"];

// The fields of a code: whole numbers.
const fieldsOf = (format, code) => {
  const { exponent, significand } = FLOATS[format];
  return { sign: code >> (exponent + significand), exponent: (code >> significand) & (2 ** exponent - 1),
    significand: code & (2 ** significand - 1) };
};

const decodeFloat = (format, code) => {
  const { exponent: width, significand: digits, ends } = FLOATS[format];
  const { sign, exponent, significand } = fieldsOf(format, code);
  const top = 2 ** width - 1, bias = 2 ** (width - 1) - 1;
  const signed = sign ? -1 : 1;
  if (exponent === top && ends === "ieee") return significand ? NaN : signed * Infinity;
  if (ends === "nan" && exponent === top && significand === 2 ** digits - 1) return NaN;
  if (exponent === 0) return signed * significand * 2 ** (1 - bias - digits);
  return signed * (1 + significand / 2 ** digits) * 2 ** (exponent - bias);
};

// Two's complement: the first bit counts −128.
const decodeInteger = (code) => (code > 127 ? code - 256 : code);
