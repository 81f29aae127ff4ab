//! Kubernetes quantities: `512Mi`, `1.5G`, `250m`, `1e3`.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A Kubernetes quantity as it was written. Numbers are read as well as strings, as the API allows.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Quantity(pub String);

/// Why a text is no quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Not of the form that Kubernetes knows.
    #[error(
        "{0:?} is no quantity: quantities must match the regular expression \
         '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
    )]
    Malformed(String),
    /// Beyond what can be counted.
    #[error("{0:?} is too large for a quantity")]
    TooLarge(String),
    /// Below zero where only a size makes sense.
    #[error("{0:?} is negative, a size is zero or more")]
    Negative(String),
}

impl Quantity {
    /// The value in thousandths, rounded up (the API's smallest unit is `m` for what godwit reads).
    pub fn milli(&self) -> Result<i128, QuantityError> {
        parse_milli(&self.0)
    }

    /// The value in whole units, rounded up, for sizes in bytes: zero or more.
    pub fn bytes(&self) -> Result<u64, QuantityError> {
        let milli = self.milli()?;
        if milli < 0 {
            return Err(QuantityError::Negative(self.0.clone()));
        }
        u64::try_from((milli + 999) / 1000).map_err(|_| QuantityError::TooLarge(self.0.clone()))
    }

    /// A quantity of bytes in its shortest exact binary form (`64Mi`, `1Gi`, `1000`).
    pub fn from_bytes(bytes: u64) -> Self {
        let units = [("Ei", 60), ("Pi", 50), ("Ti", 40), ("Gi", 30), ("Mi", 20), ("Ki", 10)];
        for (suffix, shift) in units {
            if bytes != 0 && bytes.is_multiple_of(1u64 << shift) {
                return Self(format!("{}{suffix}", bytes >> shift));
            }
        }
        Self(bytes.to_string())
    }
}

fn parse_milli(text: &str) -> Result<i128, QuantityError> {
    let malformed = || QuantityError::Malformed(text.to_owned());
    let large = || QuantityError::TooLarge(text.to_owned());
    let (negative, rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
    let (number, suffix) = rest.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || number.len() > 40 {
        return Err(malformed());
    }
    // numerator/denominator of the value in thousandths, before rounding
    let (mut numerator, mut denominator): (i128, i128) = (1000, 1);
    match suffix {
        "" => {}
        "n" => denominator = 1_000_000_000,
        "u" => denominator = 1_000_000,
        "m" => denominator = 1_000,
        "k" => numerator *= 1_000,
        "M" => numerator *= 1_000_000,
        "G" => numerator *= 1_000_000_000,
        "T" => numerator *= 1_000_000_000_000,
        "P" => numerator *= 1_000_000_000_000_000,
        "E" => numerator *= 1_000_000_000_000_000_000,
        "Ki" => numerator <<= 10,
        "Mi" => numerator <<= 20,
        "Gi" => numerator <<= 30,
        "Ti" => numerator <<= 40,
        "Pi" => numerator <<= 50,
        "Ei" => numerator <<= 60,
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E']).ok_or_else(malformed)?;
            let exponent: i32 = exponent.parse().map_err(|_| malformed())?;
            let power = 10i128.checked_pow(exponent.unsigned_abs()).ok_or_else(large)?;
            if exponent < 0 {
                denominator = power;
            } else {
                numerator = numerator.checked_mul(power).ok_or_else(large)?;
            }
        }
    }
    // digits beyond this many places only matter for rounding up, which one sticky digit keeps
    let (places, dropped) = fraction.split_at(fraction.len().min(9));
    let digits = format!("{whole}{places}");
    let mut value: i128 = if digits.is_empty() { 0 } else { digits.parse().map_err(|_| large())? };
    let mut scale = 10i128.pow(u32::try_from(places.len()).unwrap_or(9));
    if dropped.bytes().any(|b| b != b'0') {
        value = value.checked_mul(10).and_then(|v| v.checked_add(1)).ok_or_else(large)?;
        scale *= 10;
    }
    denominator = denominator.checked_mul(scale).ok_or_else(large)?;
    let product = value.checked_mul(numerator).ok_or_else(large)?;
    // rounded away from zero, as Kubernetes does
    let milli = product / denominator + i128::from(product % denominator != 0);
    Ok(if negative { -milli } else { milli })
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for Quantity {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl From<Quantity> for k8s_openapi::apimachinery::pkg::api::resource::Quantity {
    fn from(quantity: Quantity) -> Self {
        Self(quantity.0)
    }
}

impl From<k8s_openapi::apimachinery::pkg::api::resource::Quantity> for Quantity {
    fn from(quantity: k8s_openapi::apimachinery::pkg::api::resource::Quantity) -> Self {
        Self(quantity.0)
    }
}

impl Serialize for Quantity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = Quantity;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a quantity: a string or a number")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Quantity, E> {
                Ok(Quantity(text.to_owned()))
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Quantity, E> {
                Ok(Quantity(number.to_string()))
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Quantity, E> {
                Ok(Quantity(number.to_string()))
            }

            fn visit_f64<E: de::Error>(self, number: f64) -> Result<Quantity, E> {
                Ok(Quantity(number.to_string()))
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for Quantity {
    fn schema_name() -> Cow<'static, str> {
        "Quantity".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "x-kubernetes-int-or-string": true })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn milli(text: &str) -> i128 {
        Quantity::from(text).milli().unwrap()
    }

    #[test]
    fn reads_every_suffix() {
        assert_eq!(milli("64Mi"), 64 * 1024 * 1024 * 1000);
        assert_eq!(milli("1.5G"), 1_500_000_000_000);
        assert_eq!(milli("250m"), 250);
        assert_eq!(milli("1e3"), 1_000_000);
        assert_eq!(milli("12E"), 12_000_000_000_000_000_000_000);
        assert_eq!(milli("100n"), 1);
        assert_eq!(milli("-2"), -2000);
        assert_eq!(milli(".5"), 500);
        assert_eq!(milli("0.00000000001"), 1);
    }

    #[test]
    fn refuses_what_is_none() {
        for text in
            ["", "Mi", "1Zi", "1..2", "abc", "1 Gi", "1e", "--1", "1e99", "9999999999999999999999999999999999999E"]
        {
            assert!(Quantity::from(text).milli().is_err(), "{text}");
        }
        assert!(Quantity::from("-1").bytes().is_err());
    }

    #[test]
    fn sizes_round_up_and_are_written_short() {
        assert_eq!(Quantity::from("1500m").bytes().unwrap(), 2);
        assert_eq!(Quantity::from_bytes(64 << 20).0, "64Mi");
        assert_eq!(Quantity::from_bytes(1000).0, "1000");
        assert_eq!(Quantity::from_bytes(0).0, "0");
    }

    #[test]
    fn numbers_are_read() {
        let quantity: Quantity = serde_json::from_str("128974848").unwrap();
        assert_eq!(quantity.bytes().unwrap(), 128_974_848);
    }
}
