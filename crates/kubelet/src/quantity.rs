//! Kubernetes quantities, as far as limits need them.

/// The value of a quantity such as `128Mi`, `250m`, `1.5G`, `2e3`; `None` if it is none or negative.
pub(crate) fn value(text: &str) -> Option<f64> {
    let end = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let scale = match suffix {
        "" => 1.0,
        "n" => 1e-9,
        "u" => 1e-6,
        "m" => 1e-3,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "E" => 1e18,
        "Ki" => 1024.0,
        "Mi" => 1_048_576.0,
        "Gi" => 1_073_741_824.0,
        "Ti" => 1_099_511_627_776.0,
        "Pi" => 1_125_899_906_842_624.0,
        "Ei" => 1_152_921_504_606_846_976.0,
        exponent if exponent.starts_with(['e', 'E']) => 10f64.powi(exponent.get(1..)?.parse().ok()?),
        _ => return None,
    };
    let value = number.parse::<f64>().ok()? * scale;
    (value.is_finite() && value >= 0.0).then_some(value)
}

/// Whole bytes, rounded up.
pub(crate) fn bytes(text: &str) -> Option<u64> {
    value(text).map(|value| value.ceil() as u64)
}

/// Thousandths, rounded up.
pub(crate) fn millis(text: &str) -> Option<u64> {
    value(text).map(|value| (value * 1000.0).ceil() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_understood() {
        assert_eq!(bytes("128Mi"), Some(128 << 20));
        assert_eq!(bytes("1.5G"), Some(1_500_000_000));
        assert_eq!(bytes("2e3"), Some(2000));
        assert_eq!(bytes("3E"), Some(3_000_000_000_000_000_000));
        assert_eq!(millis("250m"), Some(250));
        assert_eq!(millis("2"), Some(2000));
        for bad in ["", "Mi", "-1", "1.2.3", "1Q", "e5", "nan", "1e999"] {
            assert_eq!(value(bad), None, "{bad}");
        }
    }
}
